"""TransformerLens' own attribution patching as the oracle, one pair at a time."""

import pytest
import torch
import transformers

from mechunlearn.activations import untouched
from mechunlearn.bridge import build_bridge
from mechunlearn.components import Component, Kind
from mechunlearn.facts import FactSet
from mechunlearn.localize.first_order import first_order_scores
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.models import Model, all_components, wrap_model


def _llama_with_all_key_heads(tokenizer: transformers.PreTrainedTokenizerFast) -> Model:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wrap_model(transformers.LlamaForCausalLM(config), tokenizer)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_scores_equal_transformer_lens_per_pair(architecture: str, tiny_model, tokenizer, tiny_facts: FactSet) -> None:
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    model = _llama_with_all_key_heads(tokenizer) if architecture == "llama" else tiny_model(architecture)
    model.hf.double()  # so that only the definition can differ: float32 rounding alone is up to 5e-6 here
    pairs = [p for p in build_pairs(model, tiny_facts.facts[:30]) if len(p.clean) == len(p.corrupt)]
    pairs = list({len(p.clean): p for p in pairs}.values())[:3]
    assert len({len(pair.clean) for pair in pairs}) > 1, "the batch is to hold prompts of different lengths"
    components = all_components(model, ("mlp", "head"))
    with untouched(model):
        ours, *_ = first_order_scores(model, to_batch(model, pairs), components, "denoise")
    ours = ours.sum(dim=2)
    bridge = build_bridge(model)
    for row, pair in enumerate(pairs):
        nodes = attribution_patch(
            bridge,
            torch.tensor([pair.clean]),
            torch.tensor([pair.corrupt]),
            lambda logits, pair=pair: logits[0, -1, pair.answer] - logits[0, -1, pair.counterfactual],
        ).node_scores
        kinds: dict[str, Kind] = {"mlp_out": "mlp", "attn_head_out": "head"}
        theirs = torch.zeros(len(components), dtype=torch.float64)
        for node, score in nodes.items():
            if node.kind in kinds:
                assert node.layer is not None
                theirs[components.index(Component(kinds[node.kind], node.layer, node.head))] += score
        error = (ours[row] - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-6, f"pair {row}: {error:.1e}"
