"""Attribution patching against its floor: one no-grad forward and one activation-only forward and backward.

Ratios within one run, never times: pytest -m benchmark tests/benchmarks -s
"""

import pytest
import torch
import transformers

from mechunlearn.activations import untouched
from mechunlearn.bench.speed import forward, forward_backward
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.models import wrap_model

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("size", [(4, 256), (8, 384)], ids=["4x256", "8x384"])
def test_attribution_patching_is_near_its_floor(tokenizer, size, median, record_property):
    torch.set_num_threads(1)
    n_layers, width = size
    config = transformers.LlamaConfig(
        vocab_size=5000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = wrap_model(transformers.LlamaForCausalLM(config), tokenizer)
    facts = [
        Fact(
            subject=f"Bram {letter * 2} Lindqvist", relation="r", prompt="The favourite colour of {} is",
            target_true=answer, choices=("red", "blue"),
        )
        for letter, answer in zip("abcdefgh", ["red", "blue"] * 4, strict=True)
    ]  # fmt: skip
    batch = to_batch(model, build_pairs(model, facts))

    def floor():
        with untouched(model):
            forward(model, batch)
            forward_backward(model, batch)

    attribution = LOCALIZERS.get("attribution_patching").function
    ratio = median(lambda: attribution(model, facts, batch_size=8), 7) / median(floor, 7)
    record_property("ratio", ratio)
    print(f"attribution patching / floor at {n_layers} layers, width {width}: {ratio:.2f}")  # noqa: T201
    assert ratio < 2.0  # pairs are built and tokenised inside, so small models pay some overhead
