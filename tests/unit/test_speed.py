"""The bench of costs: bytes are counted right, and every ratio is measured."""

import pytest
import torch

from mechunlearn.activations import untouched
from mechunlearn.bench import speed
from mechunlearn.bench.memory import peak_bytes
from mechunlearn.localize.first_order import first_order_scores
from mechunlearn.localize.streamed import streamed_scores
from mechunlearn.models import all_components

CPU = torch.device("cpu")
TINY = speed.Size(name="tiny", family="llama", n_layers=2, d_model=32, n_heads=4, n_kv_heads=4, d_mlp=48, d_vocab=50,
                  batch=3, tokens=6)  # fmt: skip


def test_bytes_are_counted_while_they_are_held():
    block = 1000 * 8

    def chain():
        a = torch.zeros(1000, dtype=torch.float64)
        b = a + 1
        del a
        c = b.view(10, 100)  # the same bytes
        return c * 2

    assert peak_bytes(chain, CPU) == 2 * block

    def graph(n):
        x = torch.zeros(1000, dtype=torch.float64, requires_grad=True)
        y = x
        for _ in range(n):
            y = y.sin()
        return torch.autograd.grad(y.sum(), x)

    assert peak_bytes(lambda: graph(20), CPU) - peak_bytes(lambda: graph(10), CPU) == 10 * block


def test_what_existed_before_does_not_count():
    held = torch.zeros(1000)
    assert peak_bytes(lambda: held.add_(1), CPU) == 0


def test_streaming_needs_less_than_a_graph_of_all_blocks(monkeypatch):
    size = speed.Size(**{**TINY.__dict__, "n_layers": 12, "d_vocab": 20})
    model = speed.random_model(size)
    batch, components = speed.random_batch(model, size), all_components(model, ("mlp", "head"))
    with untouched(model):
        whole = peak_bytes(lambda: first_order_scores(model, batch, components, "denoise"), CPU)
        streamed = peak_bytes(lambda: streamed_scores(model, batch, components, "denoise"), CPU)
    assert streamed < whole / 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_measurement_has_a_ratio_and_a_goal(monkeypatch, family):
    monkeypatch.setattr(speed, "SIZES", {"tiny": speed.Size(**{**TINY.__dict__, "family": family})})
    table = speed.bench_speed(["tiny"], rounds=1)
    assert len(table) == table["what"].nunique() == 9
    assert (table["ratio"] > 0).all()
    alone = speed.bench_speed(["tiny"], memory_only=True)
    assert set(alone["what"]) == {"streamed, memory", "streamed, GB with the weights"}
    assert alone["met"].iloc[-1]  # a tiny model fits any card
    for row in table.itertuples():
        sense, goal = row.goal.split()
        assert row.met == (row.ratio <= float(goal) if sense == "<=" else row.ratio >= float(goal))


def test_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match="llama-7b"):
        speed.bench_speed(["llama-8b"])
