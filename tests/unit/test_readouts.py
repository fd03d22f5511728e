"""Logit lens and direct logit attribution: by hand, against TransformerLens, and what they sum to."""

import copy

import numpy as np
import pytest
import torch

from mechunlearn.activations import last_logits, untouched
from mechunlearn.attack.logit_lens import lens_scores
from mechunlearn.bridge import build_bridge
from mechunlearn.components import Component
from mechunlearn.localize.direct_logit_attribution import direct_effects, direct_logit_attribution
from mechunlearn.localize.logit_lens import logit_lens
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.models import (
    Model,
    NotSupported,
    all_components,
    final_norm,
    has_parallel_blocks,
    unembedding,
    wrap_model,
)  # fmt: skip
from mechunlearn.probes import residual_features


@pytest.fixture(scope="module")
def facts(tiny_facts):
    return tiny_facts.of("colour").facts[:8]


def by_hand(model: Model, stream: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        logits = unembedding(model)(final_norm(model)(torch.from_numpy(stream)))
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_the_lens_is_final_norm_and_unembedding_by_hand(any_model: Model, facts) -> None:
    scores = logit_lens(any_model, facts, metric="logit_diff", batch_size=3)
    mid = not has_parallel_blocks(any_model)
    assert scores.notes["scored"] == ("sublayers" if mid else "blocks")
    assert scores.components == all_components(any_model, ("attention", "mlp") if mid else ("mlp",))
    streams = residual_features(any_model, facts, mid=mid)
    pairs = build_pairs(any_model, facts)
    for column, site in enumerate(("subject_last", "last")):
        logits = by_hand(any_model, streams[site])
        read = torch.stack([logits[p.fact, :, p.answer] - logits[p.fact, :, p.counterfactual] for p in pairs])
        np.testing.assert_allclose(scores.per_fact[:, :, column], read.diff(dim=1).numpy(), atol=1e-4)
    with torch.no_grad():
        own = last_logits(any_model, to_batch(any_model, pairs).clean)
    final = scores.per_fact[:, :, 1].sum(axis=1) + np.array([float(read[i, 0]) for i in range(len(facts))])
    expected = [float(own[p.fact, p.answer] - own[p.fact, p.counterfactual]) for p in pairs]
    np.testing.assert_allclose(final, expected, atol=1e-4)


def test_the_lens_reads_what_the_attack_of_the_same_name_reads(tiny_model, tiny_facts) -> None:
    model, facts = tiny_model("gemma2"), tiny_facts.facts[:10]  # capped logits; two relations, each with own candidates
    scores = logit_lens(model, facts, units="block")
    attack = lens_scores(model, facts)
    for column, site in enumerate(("subject_last", "last")):
        log_p = np.log([attack[f"block {site} layer {layer}"]["p_true"] for layer in (1, 2, 3)])
        np.testing.assert_allclose(scores.per_fact[:, 1:, column], np.diff(log_p, axis=0).T, atol=1e-5)


def test_direct_effects_sum_to_the_logit_difference(any_model: Model, facts) -> None:
    scores = direct_logit_attribution(any_model, facts, batch_size=5)
    pairs = build_pairs(any_model, facts)
    batch = to_batch(any_model, pairs)
    with untouched(any_model), torch.no_grad():
        streams = residual_features(any_model, facts, sites=("last",))["last"][:, -1]
        logits = unembedding(any_model)(final_norm(any_model)(torch.from_numpy(streams)))  # before any cap
        parts, embedding, bias = direct_effects(any_model, build_bridge(any_model), batch, all_components(any_model))
    expected = batch.logit_diff(logits)
    torch.testing.assert_close(parts.sum(dim=1) + embedding + bias, expected, atol=1e-4, rtol=1e-4)
    whole = scores.values.sum() + scores.notes["embedding"] + scores.notes["bias"]
    assert whole == pytest.approx(float(expected.mean()), abs=1e-4)
    np.testing.assert_allclose(scores.per_fact[:, :, 0], parts.numpy(), atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
def test_heads_sum_to_their_sublayer_where_no_norm_stands_between(architecture, tiny_model, facts) -> None:
    model = tiny_model(architecture)
    if architecture == "gemma2":
        with pytest.raises(NotSupported, match="a norm stands between"):
            direct_logit_attribution(model, facts, kinds=("head",))
        return
    for layer in range(model.n_layers):  # its bias belongs to no head
        output = model.hf.get_submodule(f"{model.architecture.blocks}.{layer}.{model.architecture.output}")
        if getattr(output, "bias", None) is not None:
            torch.nn.init.zeros_(output.bias)  # type: ignore[arg-type]
    scores = direct_logit_attribution(model, facts, kinds=("attention", "head"))
    value = dict(zip(scores.components, scores.values, strict=True))
    for layer in range(model.n_layers):
        heads = sum(value[Component("head", layer, head)] for head in range(model.n_heads))
        assert heads == pytest.approx(value[Component("attention", layer)], abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_direct_effects_are_transformer_lens_own(architecture, tiny_model, facts) -> None:
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    model = tiny_model(architecture)
    scores = direct_logit_attribution(model, facts, kinds=("attention", "mlp"))
    processed = build_bridge(wrap_model(copy.deepcopy(model.hf), model.tokenizer))
    processed.enable_compatibility_mode()  # rewrites weights: of the copy
    for pair in build_pairs(model, facts)[:3]:
        result = theirs(
            processed, torch.tensor([pair.clean]), answer_tokens=pair.answer, incorrect_tokens=pair.counterfactual
        )
        found = dict(zip(result.labels, result.attribution.flatten().tolist(), strict=True))
        expected = [found[f"{c.layer}_{'mlp' if c.kind == 'mlp' else 'attn'}_out"] for c in scores.components]
        np.testing.assert_allclose(scores.per_fact[pair.fact, :, 0], expected, atol=2e-4)


def test_an_edit_of_copied_parameters_is_seen(tiny_model, facts) -> None:
    model = tiny_model("gpt_neox")
    before = direct_logit_attribution(model, facts).values
    with torch.no_grad():
        model.hf.get_parameter(model.copied_parameters[0]).mul_(-2)
    after = direct_logit_attribution(model, facts).values
    fresh = direct_logit_attribution(wrap_model(copy.deepcopy(model.hf), model.tokenizer), facts).values
    np.testing.assert_allclose(after, fresh, atol=1e-6)
    assert np.abs(after - before).max() > 1e-3


def test_building_a_bridge_leaves_flags_and_the_random_state(any_model: Model) -> None:
    any_model.hf.requires_grad_(False)
    state = torch.get_rng_state()
    build_bridge(any_model)
    assert not any(parameter.requires_grad for parameter in any_model.hf.parameters())
    assert torch.equal(torch.get_rng_state(), state)
