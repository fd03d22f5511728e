"""Attribution patching against its floor: one no-grad forward and one activation-only forward and backward.

Ratios within one run, never times: pytest -m benchmark tests/benchmarks -s
"""

import pytest
import torch

from mechunlearn.activations import untouched
from mechunlearn.bench.speed import forward, forward_backward
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.pairs import build_pairs, to_batch

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("size", [(4, 256), (8, 384)], ids=["4x256", "8x384"])
def test_attribution_patching_is_near_its_floor(random_llama, facts, size, median, record_property):
    torch.set_num_threads(1)
    n_layers, width = size
    model = random_llama(n_layers, width)
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
