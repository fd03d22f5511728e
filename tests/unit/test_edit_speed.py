"""The bench of training steps: what it counts is what the formulas say, and every goal is judged."""

import pandas as pd
import pytest

from mechunlearn.bench import edit_speed, speed

TINY = speed.Size(name="tiny", family="llama", n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_mlp=48, d_vocab=50)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_speed, "SIZES", {"tiny": TINY})
        return edit_speed.bench_edit_speed(["tiny"], rounds=1).set_index("what")


def test_every_method_is_measured_and_its_goal_judged(table):
    assert len(table) == 6
    assert (table[["time", "floor", "held", "trained", "peak"]] > 0).all(axis=None)
    judged = table.loc[table["goal"] != ""]
    assert set(judged.index) == {edit_speed.PLAIN, edit_speed.CACHED}
    for row in judged.itertuples():
        assert row.met == (row.time <= float(row.goal.removeprefix("<= ")))


def test_gradients_and_optimizer_are_as_large_as_what_is_trained(table):
    ours = table.drop(edit_speed.PREDECESSOR)
    assert ours["held"].tolist() == pytest.approx(ours["trained"].tolist(), rel=0.02)
    assert (ours["trained"] < 0.15).all()
    # the predecessor keeps a gradient of every entry, and two moments of the masked ones
    masked = table.loc[edit_speed.PLAIN, "trained"]
    assert table.loc[edit_speed.PREDECESSOR, "held"] == pytest.approx((1 + 2 * masked) / 3, rel=0.02)


def test_the_floors_are_the_products_of_matrices_that_torch_counts(monkeypatch):
    """Counted by torch on a model of so few tokens that attention scores are next to nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(edit_speed, "TOKENS", 2)
    setting = edit_speed.Setting.of(speed.random_model(TINY), TINY.d_vocab)
    assert list(setting.layers) == [1]
    counted = {}
    for name, steps in edit_speed.methods(setting).items():
        with FlopCounterMode(display=False) as counter:
            steps(lambda _: None)
        counted[name] = counter.get_total_flops()
    floors = edit_speed.floors(setting)
    for name in (edit_speed.PLAIN, edit_speed.PREDECESSOR):
        assert floors[name] == pytest.approx(counted[name] / counted[edit_speed.FULL], rel=0.05)


def test_the_masks_are_the_mlps_of_a_quarter_of_the_layers_in_mid_depth():
    for n_layers, layers in ((2, [0]), (4, [1]), (8, [3, 4]), (12, [4, 5, 6])):
        model = speed.random_model(speed.Size(**{**TINY.__dict__, "n_layers": n_layers}))
        setting = edit_speed.Setting.of(model, TINY.d_vocab)
        assert [component.layer for component in setting.mask.components] == layers
        assert setting.neurons.n_selected * 10 == pytest.approx(setting.mask.n_selected, rel=0.1)


def test_the_model_is_left_without_gradients():
    setting = edit_speed.Setting.of(speed.random_model(TINY), TINY.d_vocab)
    edit_speed.methods(setting)[edit_speed.FULL](lambda _: None)
    assert all(p.grad is None and not p.requires_grad for p in setting.model.hf.parameters())


def test_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match="llama-7b"):
        edit_speed.bench_edit_speed(["llama-8b"])
