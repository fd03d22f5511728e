"""Figures of scores show the numbers they were given, escape what is not ours, refuse what does not fit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mechunlearn.components import ROLES, Component, ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize.agreement import agreement
from mechunlearn.localize.edges import EdgeScores
from mechunlearn.localize.faithfulness import FaithfulnessCurve
from mechunlearn.localize.lens_map import LensMap
from mechunlearn.report import figures, pictures

HOSTILE = "<script>alert(1)</script>"
COMPONENTS = tuple(Component(kind, layer) for layer in range(3) for kind in ("mlp", "attention"))
FACTS = [
    Fact(subject=f"{HOSTILE} {i}", relation="city", prompt="{} lives in", target_true=f"<b>{i}</b>") for i in range(4)
]


def _scores(seed=0, method="made up", components=COMPONENTS, roles=ROLES, n_facts=4, **given):
    per_fact = np.random.default_rng(seed).normal(size=(n_facts, len(components), len(roles)))
    return ComponentScores(
        method=method, metric="logit_diff", sign="positive: good", components=components, roles=roles,
        per_fact=per_fact, **given,
    )  # fmt: skip


def _text(figure):
    return json.dumps(figure.to_plotly_json(), default=lambda array: np.asarray(array).tolist())


def test_a_map_of_facts_shows_every_facts_own_score_and_prompt():
    scores = _scores()
    figure = figures.component_by_fact(scores, FACTS)
    (map_,) = figure.data
    np.testing.assert_allclose(map_.z, scores.per_fact.sum(axis=2).T)
    assert list(map_.y) == [str(c) for c in COMPONENTS]
    assert "lives in → &lt;b&gt;2&lt;/b&gt;" in map_.text[1][2]
    assert f"{scores.per_fact[2, 1].sum():+.3f}" in map_.text[1][2]
    assert HOSTILE not in _text(figure)
    with pytest.raises(ValueError, match="got 3 facts, allowed: the 4"):
        figures.component_by_fact(scores, FACTS[:3])


def test_a_map_of_facts_keeps_the_largest_components_in_their_order():
    scores = _scores()
    figure = figures.component_by_fact(scores, FACTS, most=3)
    best = sorted(np.argsort(-scores.reduced("mean_of_abs"))[:3])
    assert list(figure.data[0].y) == [str(COMPONENTS[i]) for i in best]
    np.testing.assert_allclose(figure.data[0].z, scores.per_fact.sum(axis=2).T[best])
    assert "3 of 6 components" in figure.layout.title.subtitle.text


def test_the_hover_of_a_map_holds_students_interval():
    scores = _scores(components=(Component("head", 1, 2), Component("head", 1, 3)))
    values = scores.per_fact.sum(axis=2)[:, 0]
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert (
        f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]<br>n = 4 facts"
        in figures.layer_by_head(scores).data[0].text[0][0]
    )
    asked = "prompt: &lt;script&gt;alert(1)&lt;/script&gt; 0 lives in, and 3 others"
    assert figures.layer_by_head(scores, facts=FACTS).data[0].text[0][0].endswith(f"n = 4 facts<br>{asked}")
    assert figures.component_by_role(_scores(), facts=FACTS).data[0].text[1][2].endswith(asked)
    assert figures.before_after(_scores(), _scores(1), facts=FACTS).data[2].text[1][2].endswith(asked)
    with pytest.raises(ValueError, match="got 3 facts, allowed: the 4 scored"):
        figures.layer_by_head(scores, facts=FACTS[1:])
    alone = replace(scores, per_fact=scores.per_fact[:1])
    assert "[" not in figures.layer_by_head(alone).data[0].text[0][0]


def test_a_map_of_tokens_names_the_prompt():
    figure = figures.layer_by_token(np.ones((1, 2)), ["a", HOSTILE], [Component("mlp", 0)])
    assert figure.data[0].text[0][0].endswith("n = 1 prompt: a&lt;script&gt;alert(1)&lt;/script&gt;")


def test_the_matrix_of_rank_correlations_holds_the_agreement_of_every_pair():
    heads = tuple(Component("head", 0, i) for i in range(4))
    scores = {HOSTILE: _scores(0), "b": _scores(1), "heads": _scores(2, components=heads)}
    figure = figures.rank_correlations(scores)
    z = np.array(figure.data[0].z)
    expected = agreement(scores[HOSTILE], scores["b"])["spearman"]
    assert z[0, 1] == pytest.approx(expected)
    assert z[1, 0] == pytest.approx(expected)
    assert np.diag(z) == pytest.approx(1)
    assert np.isnan(z[0, 2])
    assert "no components in common" in figure.data[0].text[0][2]
    assert f"{expected:.2f}" in [a.text for a in figure.layout.annotations]
    assert HOSTILE not in _text(figure)
    with pytest.raises(ValueError, match="got 1 scores, allowed: at least two"):
        figures.rank_correlations({"b": scores["b"]})


def test_profiles_are_scaled_by_their_largest_and_mark_what_was_edited():
    scores = {"a": _scores(0), "b": _scores(1)}
    figure = figures.localizer_profiles(scores, edited={"b": ["m1"], "not run": ["m2"]})
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert max(np.abs(np.array(trace.z)[1]).max() for trace in maps) == pytest.approx(1)
    assert np.array(maps[0].z)[1, 2] == pytest.approx(
        scores["a"].values[COMPONENTS.index(Component("mlp", 2))] / np.abs(scores["a"].values).max()
    )
    (marks,) = [trace for trace in figure.data if trace.type == "scatter"]
    assert (list(marks.x), list(marks.y)) == (["m1"], ["b"])


def _probe(name, values, **more):
    notes = {"curve" if name == "accuracy" else "code": {name: values, "baseline": [0.2] * len(values), **more}}
    return _scores(roles=("subject_last",), notes=notes)


@pytest.mark.parametrize("name", ["accuracy", "compression"])
def test_a_map_of_probes_has_a_column_a_position_and_a_row_a_stream(name):
    first, last = [0.1 * i for i in range(7)], [0.05 * i for i in range(7)]
    figure = figures.probe_by_position({"subject_last": _probe(name, first), HOSTILE: _probe(name, last)})
    np.testing.assert_allclose(figure.data[0].z, np.array([first, last]).T)
    assert list(figure.data[0].y) == ["embed", *map(str, COMPONENTS)]
    assert "best baseline 0.200" in figure.data[0].text[3][1]
    assert HOSTILE not in _text(figure)


def test_probes_that_do_not_belong_in_one_map_are_refused():
    good = _probe("accuracy", [0.5] * 7)
    for scores, said in (
        ({}, "got no scores"),
        ({"a": _scores()}, "'a' hold no probe's curve"),
        ({"a": good, "b": _probe("compression", [0.5] * 7)}, "several kinds"),
        ({"a": good, "b": replace(good, components=COMPONENTS[::-1])}, "several kinds or layers"),
        ({"a": _probe("accuracy", [0.5] * 6)}, "got 6 streams, allowed: 7"),
    ):
        with pytest.raises(ValueError, match=said):
            figures.probe_by_position(scores)


def test_the_lens_shows_the_answers_probability_and_the_likeliest_word():
    p = np.array([[0.1, 0.2], [0.3, 0.9]])
    lens = LensMap(
        prompt=f"a {HOSTILE}", tokens=("a", HOSTILE), streams=("embed", "m0"), answer=HOSTILE, p_answer=p,
        top=(("x", " y"), (HOSTILE, "z")), p_top=p + 0.05,
    )  # fmt: skip
    figure = figures.lens_by_token(lens)
    np.testing.assert_allclose(figure.data[0].z, p)
    assert list(figure.data[0].text[0]) == ["x", "y"]
    assert "likeliest: z 0.950<br>n = 1 prompt: a &lt;script" in figure.data[0].hovertext[1][1]
    assert HOSTILE not in _text(figure)


def _curve(method, f):
    f = np.array(f)
    return FaithfulnessCurve(method=method, sizes=(0.1, 0.5, 1.0), n_components=(1, 5, 10), f=f, completeness=1 - f)


def test_faithfulness_curves_show_f_and_name_its_areas():
    figure = figures.faithfulness_curves([_curve(HOSTILE, [0, 0.4, 1]), _curve("b", [0.2, 1.2, 1])])
    assert [list(line.y) for line in figure.data] == [[0, 0.4, 1], [0.2, 1.2, 1]]
    assert list(figure.data[0].x) == [0.1, 0.5, 1.0]
    # trapezoids by hand: 0.4 * 0.2 + 0.5 * 0.7, and what it lacks of the width 0.9
    assert figure.data[0].name.endswith("CPR 0.43, CMD 0.47")
    assert figure.layout.xaxis.type == "log"
    both = figures.faithfulness_curves([_curve("b", [0.2, 1.2, 1])], completeness=True)
    np.testing.assert_allclose(both.data[1].y, [0.8, -0.2, 0])
    assert HOSTILE not in _text(figure)
    with pytest.raises(ValueError, match="got no curves"):
        figures.faithfulness_curves([])


def _edges():
    writers = ("embed", "a0.h0", "a0.h1", "m0")
    readers = ("a0.h0.q", "a0.h1.q", "a0.h0.k", "a0.h1.k", "m0", "logits")
    values = np.zeros((2, 4, 6))
    values[:, 0, 0], values[:, 0, 2] = 3, 1  # embed -> a0.h0 by query and key
    values[:, 1, 5] = -2  # a0.h0 -> logits
    values[:, 2, 4] = 5  # a0.h1 -> m0: no way in, no way on
    values[:, 0, 5] = 0.5
    values[1] *= 2
    return EdgeScores(metric=HOSTILE, sign="", writers=writers, readers=readers, per_fact=values)


def test_a_circuit_keeps_the_strongest_edges_on_a_path_with_width_by_size_and_colour_by_sign():
    figure = figures.circuit(_edges(), n_edges=3)
    lines = {line.hovertext.partition("</b>")[0].removeprefix("<b>"): line.line for line in figure.data[:-1]}
    assert set(lines) == {"embed → a0.h0", "a0.h0 → logits"}
    assert lines["embed → a0.h0"].width == pytest.approx(2 * lines["a0.h0 → logits"].width)  # 6 and -3
    assert (lines["a0.h0 → logits"].dash, lines["embed → a0.h0"].dash) == ("dash", "solid")
    assert lines["a0.h0 → logits"].color != lines["embed → a0.h0"].color
    embed = next(line for line in figure.data if "embed → a0.h0" in (line.hovertext or ""))
    assert "+6.000" in embed.hovertext
    assert "q +4.500, k +1.500" in embed.hovertext
    assert set(figure.data[-1].text) == {"embed", "a0.h0", "logits"}
    assert HOSTILE not in _text(figure)
    assert len(figures.circuit(_edges(), n_edges=3, paths_only=False).data) == 4


def test_every_layer_of_a_circuit_is_named_once_and_no_node_is_cut_off():
    figure = figures.circuit(_edges(), n_edges=9, paths_only=False)
    assert list(figure.layout.yaxis.ticktext) == ["embedding", "0", "answer"]
    values = np.zeros((1, 2, 2))
    values[0, 0, 0], values[0, 1, 1] = 1, 1
    alone = EdgeScores(metric="", sign="", writers=("embed", "m2"), readers=("m2", "logits"), per_fact=values)
    figure = figures.circuit(alone)
    assert list(figure.layout.yaxis.ticktext) == ["embedding", "2", "answer"]
    assert figure.data[-1].cliponaxis is False


def test_a_circuit_without_a_path_or_edges_is_refused():
    with pytest.raises(ValueError, match="none of the 1 strongest edges lies on a path"):
        figures.circuit(_edges(), n_edges=1)
    with pytest.raises(ValueError, match="got n_edges 0, allowed: 1 and up"):
        figures.circuit(_edges(), n_edges=0)


def test_a_path_may_lead_through_keys_and_values_that_heads_share():
    values = np.zeros((1, 3, 4))
    values[0, 0, 1], values[0, 1, 3] = 2, 1
    edges = EdgeScores(
        metric="logit_diff", sign="", writers=("embed", "a0.h0", "m0"), readers=("a0.h0.q", "a0.g0.k", "m0", "logits"),
        per_fact=values,
    )  # fmt: skip
    assert set(figures.circuit(edges).data[-1].text) == {"embed", "a0.g0", "a0.h0", "logits"}


def test_before_after_and_difference_share_one_scale_about_zero():
    before, after = _scores(0), _scores(1)
    figure = figures.before_after(before, after)
    for trace, values in zip(figure.data, (before.by_role, after.by_role, after.by_role - before.by_role), strict=True):
        np.testing.assert_allclose(trace.z, values)
        assert trace.coloraxis == "coloraxis"
    largest = max(np.abs(np.array(trace.z)).max() for trace in figure.data)
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == pytest.approx(largest)
    moved = (after.per_fact - before.per_fact)[:, 0, 0]
    low, high = stats.t.interval(0.95, len(moved) - 1, moved.mean(), stats.sem(moved))
    assert f"[{low:+.3f}, {high:+.3f}]" in figure.data[2].text[0][0]
    with pytest.raises(ValueError, match="different components"):
        figures.before_after(before, _scores(components=COMPONENTS[:2]))
    with pytest.raises(ValueError, match="different facts_sha256"):
        figures.before_after(before, replace(after, facts_sha256="other"))


def test_two_maps_of_a_prompt_are_shown_with_their_difference():
    a, b = np.array([[1.0, -2]]), np.array([[0.5, 4]])
    figure = figures.maps_before_after(a, b, rows=["m0"], columns=["x", HOSTILE])
    assert [np.array(trace.z).tolist() for trace in figure.data] == [[[1, -2]], [[0.5, 4]], [[-0.5, 6]]]
    assert figure.layout.coloraxis.cmax == 6
    asked = figures.maps_before_after(a, b, rows=["m0"], columns=["x", "y"], prompt=HOSTILE)
    assert asked.data[2].text[0][1].endswith("score +6.000<br>n = 1 prompt: &lt;script&gt;alert(1)&lt;/script&gt;")
    assert HOSTILE not in _text(figure)
    long = figures.maps_before_after(
        np.ones((1, 13)), np.ones((1, 13)), rows=["m0"], columns=[str(i) for i in range(13)]
    )
    assert long.layout.xaxis3.dtick == 1  # every token is named
    with pytest.raises(ValueError, match="allowed: \\(1, 1\\) for both"):
        figures.maps_before_after(a, b, rows=["m0"], columns=["x"])


def test_bars_of_answers_stand_beside_each_other():
    figure = figures.answers({HOSTILE: 0.75, "b": 0.25}, {"b": 0.9, HOSTILE: 0.1}, true=HOSTILE)
    assert [list(bars.x) for bars in figure.data] == [[0.75, 0.25], [0.1, 0.9]]
    assert figure.layout.yaxis.ticktext[0].startswith("<b>&lt;script")
    assert HOSTILE not in _text(figure)
    with pytest.raises(ValueError, match="got 1 before and 2 after, allowed: the same"):
        figures.answers({"a": 1.0}, {"a": 0.5, "b": 0.5})


def test_without_a_browser_a_picture_is_refused_in_one_line(tmp_path, monkeypatch):
    def fail(*_args, **_given):
        raise RuntimeError("Kaleido requires Google Chrome\nto be installed.")

    monkeypatch.setattr(pictures.go.Figure, "to_image", fail)
    with pytest.raises(ValueError, match="requires Google Chrome; install kaleido") as refused:
        figures.save_png(figures.answers({"a": 1.0}), tmp_path / "a.png")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_picture_is_a_png_of_the_size_asked_for_where_a_browser_is(tmp_path):
    try:
        path = figures.save_png(figures.answers({"a": 1.0}), tmp_path / "a.png", width=300, height=200, scale=1)
    except ValueError as missing:
        pytest.skip(f"{missing} (ends where kaleido and a browser are installed)")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (300, 200)
