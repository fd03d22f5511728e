"""Exact patching of every layer and token against cells x one forward pass, and against the naive loop's numbers.

Ratios within one run, never times: pytest -m benchmark tests/benchmarks -s
"""

import statistics

import pytest
import torch

from mechunlearn.activations import hooked, last_logits, place_of, untouched
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.localize.patching import component_effects, exchange
from mechunlearn.localize.scoring import measure_of
from mechunlearn.models import all_components

pytestmark = pytest.mark.benchmark

N_LAYERS, WIDTH = 12, 256


@pytest.mark.parametrize("kinds", [("mlp",), ("attention",), ("mlp", "attention")], ids="+".join)
def test_exact_patching_costs_less_than_cells_times_a_forward(random_llama, facts, kinds, median, record_property):
    torch.set_num_threads(1)
    model = random_llama(N_LAYERS, WIDTH)
    batch = to_batch(model, build_pairs(model, facts))
    width = batch.roles.shape[1]
    selected = torch.eye(width, dtype=torch.bool)[:, None] & batch.roles.any(dim=2)
    components = all_components(model, kinds)
    places, measure = sorted({place_of(c) for c in components}), measure_of(batch, "logit_diff")
    n_cells = len(components) * width

    def forward():
        with untouched(model), torch.no_grad():
            return last_logits(model, batch.corrupt)

    def fast():
        with untouched(model), torch.no_grad():
            given = exchange(model, batch, places, restore=True)
            return component_effects(model, given, components, selected, measure)

    with untouched(model), torch.no_grad():  # every tenth cell by the naive loop
        found, before = fast(), batch.logit_diff(forward())
        with hooked(model, record=places) as clean:
            last_logits(model, batch.clean)
        for cell in range(0, n_cells, 10):
            place, k = place_of(components[cell // width]), cell % width
            row = selected[k].any(dim=1).nonzero()[:, 0]
            to, origin = batch.corrupt_positions[row, k], batch.clean_positions[row, k]

            def change(value, donor=clean[place], row=row, to=to, origin=origin):
                return value.index_put((row, to), donor[row, origin])

            with hooked(model, change={place: change}):
                effect = batch.logit_diff(last_logits(model, batch.corrupt)) - before
            torch.testing.assert_close(found[:, cell // width, k], effect, atol=1e-5, rtol=0)

    # in turns, so that other work on the machine falls on both
    ratio = statistics.median(n_cells * median(forward, 15) / median(fast, 1) for _ in range(3))
    record_property("ratio", ratio)
    print(  # noqa: T201
        f"cells x forward / exact patching of {'+'.join(kinds)} at {N_LAYERS} layers, width {WIDTH}, {width} tokens: "
        f"{ratio:.2f}"
    )
    assert ratio > 2.0  # the goal is 3.5; a busy machine costs some of it
