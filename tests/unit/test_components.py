import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechunlearn.components import ROLES, Component, ComponentScores

SHORT = {
    "m3": (Component("mlp", 3), "blocks.3.hook_mlp_out"),
    "a5": (Component("attention", 5), "blocks.5.hook_attn_out"),
    "a5.h2": (Component("head", 5, 2), "blocks.5.attn.hook_z"),
    "m3.n117": (Component("neuron", 3, 117), "blocks.3.mlp.hook_post"),
}


@pytest.mark.parametrize("text", SHORT)
def test_a_component_is_one_to_one_with_its_short_form_and_named_as_in_transformer_lens(text: str) -> None:
    component, hook = SHORT[text]
    assert Component.parse(text) == component
    assert str(component) == text
    assert component.tl_name == hook


@pytest.mark.parametrize("text", ["", "m", "x3", "m3.h2", "a3.n1", "m-1", "a1.h", "m3 ", "m3\n", "m٣"])
def test_anything_else_is_not_a_component(text: str) -> None:
    with pytest.raises(ValueError, match="component: got"):
        Component.parse(text)


@pytest.mark.parametrize("arguments", [("mlp", 1, 0), ("head", 1), ("mlp", -1), ("head", 1, -2), ("layer", 1)])
def test_an_impossible_component_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"^component"):
        Component(*arguments)


def test_components_sort() -> None:
    components = [component for component, _ in SHORT.values()] + [Component("mlp", 1)]
    assert sorted(components) == sorted(reversed(components))


def scores(per_fact: np.ndarray | None = None, **changes: Any) -> ComponentScores:
    components = (Component("mlp", 0), Component("mlp", 1), Component("head", 0, 1))
    if per_fact is None:
        per_fact = np.random.default_rng(0).normal(size=(6, 3, len(ROLES)))
    given = {"method": "test", "metric": "logit_diff", "sign": "positive: logits", "components": components}
    return ComponentScores(**given | {"per_fact": per_fact, "notes": {"layer": [1, 2]}} | changes)


def test_values_are_role_sums_and_fact_means() -> None:
    given = scores()
    for i in range(3):
        per_fact = [sum(given.per_fact[f, i]) for f in range(6)]
        assert given.values[i] == pytest.approx(np.mean(per_fact))
        assert given.standard_error[i] == pytest.approx(np.std(per_fact, ddof=1) / 6**0.5)
    np.testing.assert_allclose(given.by_role.sum(axis=1), given.values)


def test_ranking_is_by_descending_value_with_ties_in_order() -> None:
    per_fact = np.zeros((2, 3, 5))
    per_fact[:, 2, 0] = 1.0
    assert [str(c) for c in scores(per_fact).ranking()] == ["a0.h1", "m0", "m1"]


def test_fact_order_changes_nothing_but_rounding() -> None:
    given = scores()
    np.testing.assert_allclose(scores(given.per_fact[::-1]).values, given.values, rtol=1e-12)


def test_saved_scores_load_as_they_were(tmp_path: Path) -> None:
    # a transposed array: safetensors would store its memory in the wrong order without a word
    given = scores(np.random.default_rng(1).normal(size=(5, 3, 6)).T[:, :, :4], roles=ROLES[:4], options={"seed": 1})
    given.save(tmp_path / "deep" / "scores.safetensors")
    loaded = ComponentScores.load(tmp_path / "deep" / "scores.safetensors")
    np.testing.assert_array_equal(loaded.per_fact, given.per_fact)
    for name in ("method", "metric", "sign", "components", "roles", "options", "facts_sha256", "notes"):
        assert getattr(loaded, name) == getattr(given, name)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scores.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    scores().save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        scores(notes={"x": float("nan")}).save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_or_foreign_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no scores file"):
        ComponentScores.load(tmp_path / "none")
    (tmp_path / "foreign").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="not a saved ComponentScores"):
        ComponentScores.load(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_fact": np.zeros((0, 3, 5))}, "at least one fact"),
        ({"per_fact": np.zeros((2, 2, 5))}, "3 components"),
        ({"per_fact": np.full((2, 3, 5), np.nan)}, "not finite at m0"),
        ({"components": (Component("mlp", 0),) * 3}, "listed twice"),
    ],
)
def test_malformed_scores_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores(**changes)


def test_the_frame_has_one_row_per_component() -> None:
    frame = scores().to_frame()
    assert list(frame.component) == ["m0", "m1", "a0.h1"]
    np.testing.assert_allclose(frame[list(ROLES)].sum(axis=1), frame.value)


def test_one_fact_has_no_standard_error() -> None:
    assert np.isnan(scores(np.ones((1, 3, 5))).standard_error).all()
