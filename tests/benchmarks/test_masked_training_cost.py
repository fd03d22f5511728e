"""A step that trains the MLPs of a quarter of the layers, against a step of full fine-tuning of the same batch.

By count of operations it should be about 0.6, and 0.55 with the activations below the mask kept. In full, over sizes:
`mechunlearn bench edit-speed`. Ratios within one run, never times: pytest -m benchmark tests/benchmarks -s
"""

import pytest
import torch

from mechunlearn.bench.edit_speed import CACHED, CHECKPOINTED, NEURONS, PLAIN, bench_edit_speed

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("size", ["llama-8x128", "llama-4x256"])
def test_a_localized_step_meets_its_goals(size, record_property):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = bench_edit_speed([size], rounds=3).set_index("what")
    finally:
        torch.set_num_threads(threads)
    for what, row in table.iterrows():
        record_property(str(what), row["time"])
        print(f"{size}, {what}: {row['time']:.2f} of a full step; by count of operations {row['floor']:.2f}")  # noqa: T201
    assert table.loc[PLAIN, "met"]
    assert table.loc[CACHED, "met"]
    assert table.loc[CACHED, "time"] < 1.2 * table.loc[CACHED, "floor"]
    assert table.loc[CHECKPOINTED, "peak"] < table.loc[CACHED, "peak"]
    assert table.loc[NEURONS, "held"] == pytest.approx(table.loc[NEURONS, "trained"], rel=0.01)
