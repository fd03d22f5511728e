"""Reports are built from an invented run whose texts try to be HTML."""

import html
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from mechunlearn.attack.results import COLUMNS, AttackResult, Health
from mechunlearn.components import ROLES, Component, ComponentScores
from mechunlearn.evaluate.results import COLUMNS as EVALUATED
from mechunlearn.evaluate.results import Evaluation
from mechunlearn.evidence import gather_evidence
from mechunlearn.report import figures, tables, theme
from mechunlearn.report.html import render, write_report
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval
from mechunlearn.verdict import decide, demonstrate_power

HOSTILE = "<script>alert(1)</script>"
N_LAYERS, N_FACTS, CHANCE = 6, 96, 0.05
SUBJECTS = [HOSTILE, "[/INST]", "a & b", *(f"person {i}" for i in range(N_FACTS - 3))]


def _rows(rng, level, setting, step=0):
    p_true = np.clip(rng.beta(8 * level, 8 * (1 - level), N_FACTS), 0, 1)
    columns = [SUBJECTS, ["city"] * N_FACTS, ["Oslo"] * N_FACTS, ["forget_hidden"] * N_FACTS]
    frame = pd.DataFrame(dict(zip(COLUMNS[:4], columns, strict=True)))
    return frame.assign(setting=setting, step=step, p_true=p_true, correct=p_true > 0.5)


def _attacks(rng, before, after, fitted=1.0):
    """Asking, relearning and probing of a model that says `before` when asked and `after` when attacked."""
    common = {"seed": 0, "options": {"drop_targets": False}, "model": HOSTILE}
    rise = {step: before + (after - before) * step / 40 for step in (0, 10, 20, 30, 40)}
    dev = {
        s: [[t, v * f] for t, v in rise.items()]
        for s, f in (("full lr=0.001", 1.0), ("full lr=0.003", 0.7), ("lora lr=0.001", 0.5))
    }
    asking = pd.concat([_rows(rng, before, form) for form in ("prompt", "paraphrase:0", "choice")])
    layers = [
        _rows(rng, before + (after - before) * n / N_LAYERS, f"retain_train subject_last layer {n}")
        for n in range(N_LAYERS + 1)
    ]
    layers += [
        _rows(rng, before + (after - before) * n / N_LAYERS / 2, f"retain_train last layer {n}")
        for n in range(N_LAYERS + 1)
    ]
    return (
        AttackResult(
            attack="asking",
            access="prompts",
            decides=True,
            zero_budget=True,
            rows=asking,
            chosen="prompt",
            before=_rows(rng, before, "prompt"),
            health=Health(),
            notes={},
            **common,
        ),
        AttackResult(
            attack="relearning",
            access="weights",
            decides=True,
            chosen="full lr=0.001",
            chosen_step=40,
            rows=pd.concat([_rows(rng, v, "full lr=0.001", t) for t, v in rise.items()]),
            notes={"dev_p_true": dev},
            before=_rows(rng, before, "before"),
            **common,
            health=Health(fitted=fitted, retained_before=0.97, retained_after=0.95, perplexity_ratio=1.04),
        ),
        AttackResult(
            attack="probing",
            access="activations",
            decides=True,
            chosen="retain_train subject_last layer 4",
            rows=pd.concat(layers),
            before=_rows(rng, before, "before"),
            health=Health(fitted=0.99),
            notes={},
            **common,
        ),
    )


def _evaluation(rng, forgotten, kept):
    rows = []
    for part, level in (("forget_hidden", forgotten), ("retain_test", kept), ("same_subject", kept - 0.1)):
        for form in ("prompt", "paraphrase:0", "question:0"):
            rows += [(part, s, "city", "Oslo", form, "accuracy", float(rng.random() < level)) for s in SUBJECTS]
    rows += [
        ("text", "", "", "", "text", "perplexity_ratio", 1.03),
        ("text", "", "", "", "text", "kl", 0.012),
    ]
    return Evaluation(rows=pd.DataFrame(rows, columns=pd.Index(EVALUATED)), options={})


def _cell(rng, name, role, before, after, *, controls=(), fitted=1.0, **more):
    edited, null = _attacks(rng, before, after, fitted), _attacks(rng, CHANCE, CHANCE)
    evidence = [gather_evidence([u], [n]) for u, n in zip(edited, null, strict=True)]
    given = {"original": 0.95, "null_before": CHANCE, "draws": 500}
    if role == "suppressed":
        controls = (demonstrate_power("lora", evidence, **given),)
    verdict = decide(evidence, controls=controls, **given)
    return Cell(
        name=name,
        role=role,
        verdict=verdict,
        evaluation=_evaluation(rng, before, 0.95),
        edited=edited,
        null=null,
        notes={"controls": [list(c.recovered_by) for c in controls]},
        **more,
    )


def _scores(rng, method, notes, roles=ROLES):
    components = tuple(Component(kind, layer) for kind in ("mlp", "attention") for layer in range(N_LAYERS))
    means = np.array([[np.exp(-((c.layer - 2) ** 2) / 2) if c.kind == "mlp" else 0.1] for c in components])
    per_fact = means[None] * rng.normal(1, 0.5, (20, 1, len(roles))) + rng.normal(
        0, 0.1, (20, len(components), len(roles))
    )
    return ComponentScores(
        method=method,
        metric="logit difference",
        sign=f"gain in what can be read from before to after the block; positive: restores {HOSTILE}",
        components=components,
        roles=roles,
        per_fact=per_fact,
        notes=notes,
    )


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    base = np.array([0.1, 0.12, 0.5, 0.8, 0.93, 0.95, 0.95])
    curve = {
        "accuracy": base,
        "majority": base * 0 + 0.1,
        "bag": base * 0 + 0.2,
        "twin": 0.1 + base * 0.1,
        "control": base * 0 + 0.07,
    }
    probe_notes = {
        "curve": {k: list(v) for k, v in curve.items()},
        "band": {"first": 1, "last": 3},
        "band_reason": HOSTILE,
    }
    suppressed = _cell(rng, "suppressed", "suppressed", 0.1, 0.9)
    controls = (
        demonstrate_power(
            "lora",
            [gather_evidence([u], [n]) for u, n in zip(suppressed.edited, suppressed.null, strict=True)],
            original=0.95,
            null_before=CHANCE,
            draws=500,
        ),
    )
    changes = pd.DataFrame({"component": ["m1", "m2", "a3"], "layer": [1, 2, 3], "relative_change": [0.11, 0.2, 0.03]})
    edit = {"editor": "inject", "n_selected": 394_240, "share": 0.167}
    cells = (
        suppressed,
        _cell(rng, "original", "original", 0.95, 0.96, controls=controls),
        _cell(rng, "second-twin", "twin", CHANCE, CHANCE, controls=controls),
        _cell(
            rng,
            "inject-fact_lookup_probe",
            "arm",
            0.08,
            0.12,
            controls=controls,
            localizer="fact_lookup_probe",
            components=("m1", "m2"),
            weight_changes=changes,
            **edit,
        ),
        _cell(
            rng,
            "inject-attribution_patching",
            "arm",
            0.08,
            0.55,
            controls=controls,
            localizer="attribution_patching",
            components=("m2", "m4"),
            weight_changes=changes.assign(component=["m2", "m4", "m5"]),
            **edit,
        ),
        _cell(
            rng,
            f"inject-{HOSTILE}",
            "arm",
            0.2,
            0.5,
            controls=controls,
            fitted=0.5,
            localizer="random_mlps",
            components=("m0", "m5"),
            weight_changes=changes.assign(component=["m0", "m5", "m1"]),
            **edit,
        ),
    )
    agreement = pd.DataFrame(
        {
            "a": ["fact_lookup_probe", "attribution_patching"],
            "b": ["resample_ablation at the subject"] * 2,
            "pearson": [0.8, 0.3],
            "spearman": [0.9, math.nan],
            "top_k_recall": [1.0, 0.5],
            "k": [2, 2],
            "n_components": [6, 6],
        }
    )
    heads = tuple(Component("head", layer, h) for layer in range(3) for h in range(4))
    head_scores = ComponentScores(
        method="heads",
        metric="logit difference",
        sign="positive: helps",
        components=heads,
        roles=("all",),
        per_fact=rng.normal(size=(9, 12, 1)),
    )
    scores = {
        "fact_lookup_probe": _scores(rng, "fact_lookup_probe", probe_notes, ("subject_last",)),
        "attribution_patching": _scores(rng, "attribution_patching", {}),
        "heads": head_scores,
    }
    manifest = {
        "name": f"demo {HOSTILE}",
        "model": {"name": "atlas", "sha256": "0" * 64},
        "twin": None,
        "finished": "2026-11-21T02:00:00+00:00",
        "facts": {"name": "people", "parts": {"forget_hidden": N_FACTS}},
        "settings": {"seed": 0, "note": HOSTILE},
        "summary": [f"fact_lookup_probe: highest m2 (+0.31); band m1 to m3; {HOSTILE}"],
        "versions": {"torch": "2"},
    }
    return Run(manifest=manifest, scores=scores, agreement=agreement, cells=cells)


@pytest.fixture(scope="module")
def page(run):
    return render(run)


def _empty(run):
    return Run(manifest={"name": "empty"}, scores={}, agreement=pd.DataFrame(), cells=())


def test_every_figure_builds_and_has_data(run):
    arm = run.cell("inject-fact_lookup_probe")
    made = [
        figures.component_by_role(run.scores["attribution_patching"]),
        figures.layer_by_head(run.scores["heads"]),
        figures.localizer_profiles(run.scores),
        figures.localizer_agreement(run),
        figures.shares(run),
        figures.damage(run),
        figures.probe_curve(run.scores["fact_lookup_probe"].notes),
        figures.relearning_curves(arm),
        figures.probe_by_layer(arm),
        figures.weight_changes(run),
        figures.weight_changes(arm),
    ]
    for figure in made:
        assert isinstance(figure, go.Figure)
        assert figure.data
        assert figure.layout.title.text


def test_colour_scales_of_signed_scores_are_symmetric_about_zero_and_shared(run):
    figure = figures.component_by_role(run.scores["attribution_patching"])
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin > 0
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert figure.layout.coloraxis.cmax == pytest.approx(np.abs(run.scores["attribution_patching"].by_role).max())


def test_a_heat_map_shows_each_score_in_its_own_place(run):
    scores = run.scores["attribution_patching"]
    mlps = figures.component_by_role(scores).data[0]
    at = scores.components.index(Component("mlp", 3))
    assert list(mlps.z[list(mlps.y).index(3)]) == pytest.approx(list(scores.by_role[at]))
    assert "n = 20 facts" in mlps.text[3][0]


def test_repeated_and_hostile_tokens_become_distinct_escaped_labels():
    labels = theme.token_labels([HOSTILE, " the", " the", "[/INST]", "a & b", ""])
    assert len(set(labels)) == 6
    assert not any("<" in text for text in labels)
    assert html.unescape(labels[0]) == HOSTILE
    assert labels[3:5] == ("[/INST]", "a·&amp;·b")


def test_no_label_of_a_prompt_can_be_read_as_a_tag():
    tokens, components = [HOSTILE, "b", "b"], [Component("mlp", 0), Component("mlp", 1)]
    figure = figures.layer_by_token(np.array([[1.0, -2, 0], [0, 0, 3]]), tokens, components)
    assert "<script" not in json.dumps(figure.to_plotly_json(), default=str)
    with pytest.raises(ValueError, match="allowed: \\(2, 2\\)"):
        figures.layer_by_token(np.zeros((3, 2)), ["a", "b"], components)


def test_relearning_curves_pass_through_the_means_of_their_rows_and_star_the_chosen_step(run):
    cell = run.cell("inject-attribution_patching")
    figure = figures.relearning_curves(cell)
    after = np.mean(list(cell.edited[1].hidden_scores().values()))
    bold = next(trace for trace in figure.data if trace.name == "this model" and trace.showlegend)
    assert bold.y[-1] == pytest.approx(after)
    stars = [trace for trace in figure.data if trace.marker.symbol == "star"]
    assert [list(star.x) for star in stars] == [[40], [40]]


def test_the_forest_plot_shows_the_bounds_of_the_verdict(run):
    figure = figures.shares(run)
    for trace in figure.data:
        rows = [next(r for r in cell.verdict.rows if r.name == trace.name) for cell in run.cells]
        assert list(trace.x) == pytest.approx([r.share for r in rows])
        upper = np.array(trace.x) + np.array(trace.error_x.array)
        assert list(upper) == pytest.approx([r.upper for r in rows])


def test_figures_without_data_say_what_is_missing(run):
    empty, arm = _empty(run), run.cell("original")
    for make in (
        figures.shares,
        figures.damage,
        lambda empty: figures.localizer_profiles(empty.scores),
        figures.localizer_agreement,
        figures.weight_changes,
    ):
        with pytest.raises(ValueError, match="no "):
            make(empty)
    for make in (
        lambda: figures.relearning_curves(arm, attack="lens"),
        lambda: figures.probe_curve({}),
        lambda: figures.weight_changes(arm),
        lambda: figures.layer_by_head(run.scores["fact_lookup_probe"]),
    ):
        with pytest.raises(ValueError, match=r"no|hold"):
            make()


def test_the_verdict_table_has_one_row_a_cell_and_agrees_with_the_verdict(run):
    frame = tables.verdict_table(run)
    assert list(frame["cell"]) == [cell.name for cell in run.cells]
    for cell, row in zip(run.cells, frame.to_dict("records"), strict=True):
        assert row["verdict"] == str(cell.verdict)
        chosen = tables.strongest(cell.verdict)
        assert chosen is not None
        assert row["D"] == Interval(value=chosen.share, lower=chosen.lower, upper=chosen.upper, n=N_FACTS)
        assert row["retained"].n == N_FACTS
    assert frame["health"].iloc[-1].startswith("relearning: health failed")
    assert tables.verdict_table(_empty(run)).empty


def test_attack_and_arms_tables_hold_an_n_and_bounds_for_every_mean(run):
    attacks, arms = tables.attack_table(run), tables.arms_table(run)
    assert len(attacks) == 3 * len(run.cells)
    assert (attacks["n_facts"] == N_FACTS).all()
    assert (
        (attacks["edited_after_lower"] <= attacks["edited_after"])
        & (attacks["edited_after"] <= attacks["edited_after_upper"])
    ).all()
    assert (arms["retained_n"] == N_FACTS).all()
    assert arms["edit_success"].isna().all()  # not measured here


def test_what_was_not_measured_is_not_a_number_in_any_table(run):
    cell = run.cell("original")
    assert tables.measured(cell, "retain_test", "no such metric") is None
    assert tables.hidden_interval(cell.edited, "no such attack") is None


class _Tags(HTMLParser):
    """Collects tags, attributes and the text outside of scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text += data


def test_hostile_strings_arrive_escaped_and_only_our_own_scripts_run(run, page):
    parser = _Tags()
    parser.feed(page)
    n_figures = page.count("plotly-graph-div") - page.count('".plotly-graph-div"')
    assert (
        parser.tags.count("script") == n_figures + 4
    )  # plotly.js, one a figure, the colours, facts as JSON and what shows them
    assert HOSTILE not in page
    assert HOSTILE in parser.text
    assert "a & b" not in page.replace("a &amp; b", "")


def test_the_page_loads_nothing_and_inlines_plotly_once(page):
    parser = _Tags()
    parser.feed(page)
    assert not [
        value for name, value in parser.attributes if name in ("src", "href") and not (value or "").startswith("#")
    ]
    assert page.count("* plotly.js v") == 1


def test_the_page_says_every_verdict_in_a_sentence_and_names_the_controls(run, page):
    parser = _Tags()
    parser.feed(page)
    for cell in run.cells:
        assert cell.verdict.reason in parser.text
        assert cell.verdict.settle is None or cell.verdict.settle in parser.text
    assert parser.text.count("As it should be.") == 3
    assert parser.tags.count("caption") == parser.tags.count("table") >= 4
    assert re.findall(r"<h1>", page) == ["<h1>"]


def test_a_report_is_the_same_bytes_each_time(run):
    short = replace(run, cells=run.cells[3:4])
    assert render(short) == render(short)


def test_a_report_appears_whole_or_not_at_all(run, tmp_path):
    path = write_report(_empty(run), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>")
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_report(None, path)  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_run_without_attacks_twins_or_scores_still_makes_a_page(run):
    assert "removed or hidden?" in render(_empty(run))
    cell = run.cell("original")
    alone = Cell(
        name="alone", role="arm", verdict=cell.verdict, evaluation=cell.evaluation, edited=cell.edited, null=()
    )
    assert "alone" in render(Run(manifest={"name": "alone"}, scores={}, agreement=pd.DataFrame(), cells=(alone,)))


def test_importing_the_report_package_loads_neither_plotly_nor_jinja():
    code = "import sys, mechunlearn.report; sys.exit(any(m in sys.modules for m in ('plotly', 'jinja2', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
