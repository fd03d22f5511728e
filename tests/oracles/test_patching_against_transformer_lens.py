"""TransformerLens' own activation patching as the oracle: every layer, token and head, per example."""

from functools import partial

import pytest
import torch

from mechunlearn.activations import place_of, untouched
from mechunlearn.bridge import build_bridge
from mechunlearn.facts import FactSet
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.localize.patching import component_effects, exchange
from mechunlearn.localize.scoring import measure_of
from mechunlearn.models import all_components


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_denoising_equals_transformer_lens_at_every_token(architecture: str, tiny_model, tiny_facts: FactSet) -> None:
    from transformer_lens import patching

    model = tiny_model(architecture)
    model.hf.double()  # so that only the definition can differ
    pairs = [p for p in build_pairs(model, tiny_facts.facts[:30]) if len(p.clean) == len(p.corrupt)]
    pairs = [p for p in pairs if len(p.clean) == len(pairs[0].clean)][:3]
    assert len(pairs) > 1
    batch, n_tokens = to_batch(model, pairs), len(pairs[0].clean)
    assert batch.clean_positions.shape[1] == n_tokens
    selected = torch.eye(n_tokens, dtype=torch.bool)[:, None].expand(-1, len(pairs), -1)
    mlps, heads = all_components(model, ("mlp",)), all_components(model, ("head",))
    with untouched(model), torch.no_grad():
        places = [place_of(c) for c in (*mlps, *heads)]
        given, measure = exchange(model, batch, places, restore=True), measure_of(batch, "logit_diff")
        ours = [component_effects(model, given, group, selected, measure) for group in (mlps, heads)]

    bridge = build_bridge(model)
    metric = lambda logits: batch.logit_diff(logits[:, -1])  # noqa: E731
    with torch.no_grad():
        before = metric(bridge(batch.corrupt.ids))
        wanted = lambda name: name.endswith(("hook_mlp_out", "hook_z", "mlp.hook_out"))  # noqa: E731
        _, cache = bridge.run_with_cache(batch.clean.ids, names_filter=wanted)
        by_token = partial(patching.get_act_patch_mlp_out, reduce="none")
        by_head = partial(patching.get_act_patch_attn_head_out_by_pos, reduce="none")
        theirs_mlp = by_token(bridge, batch.corrupt.ids, cache, metric).values - before  # [layer pos batch]
        theirs_head = by_head(bridge, batch.corrupt.ids, cache, metric).values - before  # [layer pos head batch]
    expected = [theirs_mlp.permute(2, 0, 1), theirs_head.permute(3, 0, 2, 1).flatten(1, 2)]
    for mine, truth in zip(ours, expected, strict=True):
        assert truth.abs().max() > 1e-3
        torch.testing.assert_close(mine, truth, atol=2e-7, rtol=0)  # TransformerLens keeps its results in float32
