"""Reports of cells with several results an attack: made from invented rows, two seeds and two hidden parts."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest

from mechunlearn.attack.results import AttackResult, Health
from mechunlearn.evaluate.results import COLUMNS as EVALUATED
from mechunlearn.evaluate.results import Evaluation
from mechunlearn.evidence import gather_evidence
from mechunlearn.report import figures, tables
from mechunlearn.report.cards import card_of
from mechunlearn.report.diagnostics import Power
from mechunlearn.report.facts import fact_data
from mechunlearn.report.html import render
from mechunlearn.report.numbers import hidden_interval
from mechunlearn.runs import Cell, Run
from mechunlearn.verdict import decide

HOSTILE = "</script><!--<b>Ada & co"
PARTS = (tuple([HOSTILE, *(f"person {i}" for i in range(5))]), tuple(f"person {i}" for i in range(5, 9)))
FORMS = ("prompt", "choice")
KEPT = pd.DataFrame([("text", "", "", "", "text", "perplexity_ratio", 1.0)], columns=pd.Index(EVALUATED))


def _rows(rng, subjects, setting, level, step=0):
    p = np.clip(level + rng.normal(0, 0.05, len(subjects)), 0, 1)
    columns = {"subject": subjects, "relation": "city", "answer": "Oslo", "part": "forget_hidden", "setting": setting}
    rows = pd.DataFrame({**columns, "step": step, "p_true": p, "correct": p > 0.5})
    return rows.assign(top=np.where(p > 0.5, "Oslo", "Rome <i>"))


def _results(rng, level, *, seed, fold, kappa=1.0, options=None):
    """Asking, relearning (longer under seed 1) and probing (another training set in part 1)."""
    subjects, common = PARTS[fold], {"seed": seed, "fold": fold, "options": options or {}, "health": Health()}
    asking = pd.concat([_rows(rng, subjects, form, level) for form in FORMS], ignore_index=True)
    steps = (0, 4, 8) if seed else (0, 2, 4)
    setting, part = ("full lr=0.001", "retain_train") if fold == 0 else ("lora lr=0.003", "forget_shown")
    before = _rows(rng, subjects, "before", level)
    curves = [_rows(rng, subjects, setting, min(1, level + step / 20), step) for step in steps]
    layers = [_rows(rng, subjects, f"{part} last layer {n}", level + n / 10) for n in range(3)]
    code = {"part": "forget_known", "site": "last", "layer": 2, "n": 6, "compression": kappa + seed,
            "control_compression": 0.9}  # fmt: skip
    return (
        AttackResult(attack="asking", access="prompts", decides=True, zero_budget=True, rows=asking, before=before,
                     chosen="prompt", notes={}, by_form=asking, **common),
        AttackResult(attack="relearning", access="weights", decides=True, rows=pd.concat(curves, ignore_index=True),
                     before=before, chosen=setting, chosen_step=steps[-1],
                     notes={"dev_p_true": {setting: [[s, 0.5] for s in steps]}}, **common),
        AttackResult(attack="probing", access="activations", decides=True, rows=pd.concat(layers), before=before,
                     chosen=f"{part} last layer 2", notes={"mdl": [code]}, **common),
    )  # fmt: skip


def _cell(name, role, level, *, null="twin", notes=None, kappa=1.0, options=None, **more):
    rng = np.random.default_rng(0)
    runs = [(seed, fold) for seed in (0, 1) for fold in (0, 1)]
    edited, other = (
        tuple(r for seed, fold in runs for r in _results(rng, at, seed=seed, fold=fold, kappa=k, options=options))
        for at, k in ((level, kappa), (0.1, 0.75))
    )
    evidence = [
        gather_evidence(*([r for r in group if r.attack == attack] for group in (edited, other)))
        for attack in ("asking", "relearning", "probing")
    ]
    return Cell(
        name=name, role=role, edited=edited, null=other, notes=notes or {},
        verdict=decide(evidence, original=0.9, null_before=0.1, draws=500, null=null),
        evaluation=Evaluation(rows=KEPT, options={}), **more,
    )  # fmt: skip


ACCEPTANCE = {"direct_accuracy": 0.05, "chance": 0.04, "p_value": 0.4, "retained_before": 0.98, "retained_after": 0.97,
              "probe_before": 0.8, "probe_after": 0.79, "reason": ""}  # fmt: skip


def _control(kind, level, recovered_by, reason=""):
    control = {"kind": kind, "recovered_by": recovered_by, "accepted": not reason}
    notes = {"acceptance": ACCEPTANCE | {"reason": reason}, "control": control}
    changes = {"component": ["m2", "a3"], "relative_change": [0.1, 0.3], "flips_int8": [0.5, 0.7], "flips_int4": 0.02}
    return _cell(f"suppressed-{kind}", "suppressed", level, notes=notes, weight_changes=pd.DataFrame(changes))


@pytest.fixture(scope="module")
def run():
    cells = (
        _control("lora", 0.15, ["relearning"]),
        _control("noise", 0.9, [], reason=f"still answers 70% directly {HOSTILE}"),
        _cell("original", "original", 0.9),
        _cell("arm", "arm", 0.2, editor="inject", kappa=1.5, options={"drop_targets": True}),
    )
    manifest = {"name": "several", "facts": {"hidden": 10}, "settings": {"seeds": 2}}
    return Run(manifest=manifest, scores={}, agreement=pd.DataFrame(), cells=cells)


@pytest.fixture(scope="module")
def page(run):
    return render(run)


def _of(cell, attack):
    return [result for result in cell.edited if result.attack == attack]


def test_a_fact_under_two_seeds_is_one_fact_and_hidden_parts_add_up(run):
    results = _of(run.cell("arm"), "relearning")
    found = hidden_interval(results, "relearning")
    assert found is not None
    assert found.n == 10
    by_seed = [np.concatenate([r.final()["p_true"] for r in results if r.seed == seed]) for seed in (0, 1)]
    assert found.value == pytest.approx(np.mean(by_seed))
    once = hidden_interval(results[:1], "relearning")
    twice = hidden_interval([results[0], replace(results[0], seed=7)], "relearning")
    assert once == twice  # the same scores again are no more evidence


def test_the_attack_table_lists_what_every_result_chose(run):
    row = tables.attack_table(run).query("cell == 'arm' and attack == 'relearning'").iloc[0]
    assert row["setting"] == "full lr=0.001; lora lr=0.003"
    assert row["step"] == "4, 8"
    assert (row["n_results"], row["n_seeds"], row["n_facts"], row["null"]) == (4, 2, 10, "twin")


def test_the_bold_relearning_line_is_the_mean_over_all_facts_up_to_the_step_that_all_reach(run):
    figure = figures.relearning_curves(run.cell("arm"))
    bold = next(trace for trace in figure.data if trace.name == "this model" and trace.showlegend)
    results = _of(run.cell("arm"), "relearning")
    assert list(bold.x) == [0, 2, 4]
    for step in (0, 4):
        at = pd.concat([r.rows.query(f"step == {step}") for r in results]).groupby("subject")["p_true"].mean()
        assert bold.y[list(bold.x).index(step)] == pytest.approx(at.mean())
    assert sum(trace.marker.symbol == "star" for trace in figure.data) == 8  # four results on model and twin
    assert "dev facts, first of 4 results" in [a.text for a in figure.layout.annotations]


def test_probes_trained_on_different_parts_make_one_line_over_all_hidden_facts(run):
    figure = figures.probe_by_layer(run.cell("arm"))
    assert [trace.name for trace in figure.data] == ["this model, last", "twin, last"]
    rows = pd.concat([r.rows[r.rows["setting"].str.endswith("layer 2")] for r in _of(run.cell("arm"), "probing")])
    assert figure.data[0].y[2] == pytest.approx(rows.groupby("subject")["p_true"].mean().mean())
    assert "n = 10" in figure.data[0].hovertext[2]


def test_power_is_what_the_control_recorded_and_a_refused_one_shows_none(run, page):
    frame = tables.power_shown(run).set_index("kind")
    lora, noise = frame.loc["lora"], frame.loc["noise"]
    cell = run.cell("suppressed-lora")
    row = next(row for row in cell.verdict.rows if row.name == "relearning")
    assert lora["relearning"] == Power(value=row.share, lower=row.lower, upper=row.upper, n=10, recovers=True)
    assert not lora["asking"].recovers
    assert (lora["accepted"], lora["probe_after"]) == (True, 0.79)
    assert noise["reason"].startswith("still answers")
    assert noise["asking"].lower > 0.1
    assert not any(noise[name].recovers for name in ("asking", "relearning", "probing"))
    assert page.count("✓ recovers") == 1
    assert page.count("not counted") == 3
    unknown = tables.power_shown(replace(run, cells=(replace(cell, notes={}),))).iloc[0]
    assert np.isnan(unknown["chance"])
    assert unknown["relearning"].recovers == (row.lower > 0.1)


def test_without_a_twin_every_text_and_column_says_made_up_facts(run):
    alone = replace(run, cells=(_cell("arm", "arm", 0.2, null="proxy"),))
    assert {"made-up facts before", "made-up facts after"} < set(tables.verdict_table(alone).columns)
    assert (tables.attack_table(alone)["null"] == "made-up facts").all()
    assert "made-up facts" in card_of(alone.cells[0]).null
    assert figures.probe_by_layer(alone.cells[0]).data[1].name == "made-up facts, last"
    text = re.sub(r"<script.*?</script>", "", render(alone), flags=re.S)
    assert "made-up facts" in text
    assert not re.search(r"\btwin (before|after|attacked)|beside a twin", text)


def test_cards_say_what_each_cell_was_compared_with(run):
    words = {cell.name: card_of(cell).null for cell in run.cells}
    assert words["arm"] == "the twin, edited and attacked alike"
    assert words["original"] == "the twin, attacked alike"
    assert words["suppressed-lora"] == "the twin, suppressed and attacked alike"
    twin = _cell("second-twin", "twin", 0.2)
    assert (twin.verdict.label, card_of(twin).as_expected) == ("inconclusive", None)  # no proof, yet no false alarm
    assert card_of(run.cell("original")).as_expected
    refused = card_of(run.cell("suppressed-noise"))
    assert refused.as_expected is None
    assert "still answers" in refused.purpose


def test_code_lengths_are_averaged_over_results_and_compared_with_the_null(run):
    rows = tables.compression_table(run).query("cell == 'arm'")
    assert len(rows) == 1
    row = rows.iloc[0]
    assert (row["model"], row["null"], row["difference"]) == pytest.approx((2.0, 1.25, 0.75))
    assert (row["n"], row["n_results"]) == (6, 4)


def test_flips_stand_in_the_table_and_under_the_pointer(run):
    row = tables.weight_table(run).iloc[0]
    assert (row["flips_int8"], row["flips_int8_lowest"], row["flips_int8_highest"]) == pytest.approx((0.6, 0.5, 0.7))
    figure = figures.weight_changes(run)
    assert "50.0% of its int8 codes" in figure.data[0].hovertext[0][0]


def test_options_that_differ_between_cells_are_all_recorded(page):
    text = re.search(r"<summary>Options of every method</summary><pre>(.*?)</pre>", page, re.S)
    assert text is not None
    recorded = json.loads(text[1].replace("&#34;", '"'))["attack"]["asking"]
    assert [used["options"] for used in recorded] == [{}, {"drop_targets": True}]
    assert (recorded[1]["seeds"], recorded[1]["hidden parts"], recorded[1]["cells"]) == ([0, 1], [0, 1], ["arm"])


def test_the_fact_table_holds_every_fact_in_every_form_before_and_after(run):
    frame = tables.fact_table(run)
    assert not frame.duplicated(["cell", "subject", "relation", "answer", "state", "form"]).any()
    counts = frame.query("cell == 'arm'").groupby(["state", "form"]).size()
    assert counts.to_dict() == {
        ("original", "prompt"): 10, ("original", "choice"): 10, ("asked", "prompt"): 10, ("asked", "choice"): 10,
        ("relearning", "prompt"): 10, ("probing", "activations"): 10,
    }  # fmt: skip
    assert "original" not in set(frame.query("cell == 'original'")["state"])
    one = frame.query("cell == 'arm' and subject == 'person 6' and state == 'relearning'").iloc[0]
    rows = pd.concat([r.final() for r in _of(run.cell("arm"), "relearning")]).query("subject == 'person 6'")
    assert one["seeds"] == len(rows) == 2
    assert one["p_true"] == pytest.approx(rows["p_true"].mean())
    assert one["correct"] == rows["correct"].mean()
    first, arm = (frame.query(f"cell == '{name}' and form == 'choice'") for name in ("original", "arm"))
    assert list(first.query("state == 'asked'")["p_true"]) == list(arm.query("state == 'original'")["p_true"])


def test_rows_without_a_top_answer_or_an_asking_attack_still_make_a_table(run):
    cell = run.cell("arm")
    old = tuple(replace(r, rows=r.rows.drop(columns="top"), before=r.before.drop(columns="top"), by_form=None)
                for r in cell.edited if r.attack != "asking")  # fmt: skip
    frame = tables.fact_table(replace(run, cells=(replace(cell, edited=old),)))
    assert set(frame["top"]) == {""}
    assert set(frame["state"]) == {"asked", "relearning", "probing"}


def test_what_is_embedded_is_the_fact_table(run, page):
    found = re.search(r'<script type="application/json" id="fact-data">(.*?)</script>', page, re.S)
    assert found is not None
    assert not set("<>&") & set(found[1])
    data = json.loads(found[1])
    texts, rows = data["texts"], []
    for cell in data["cells"]:
        for state in ([data["original"]] if cell["original"] else []) + cell["states"]:
            for i, form in enumerate(state["forms"]):
                columns = zip(data["facts"], state["p"][i], state["correct"][i], state["top"][i], strict=True)
                rows += [
                    (cell["name"], *(texts[j] for j in fact), state["name"], texts[form], p / 1000, c / 100, texts[top])
                    for fact, p, c, top in columns
                    if p is not None
                ]
    frame = tables.fact_table(run)
    table = frame.assign(p_true=frame["p_true"].round(3)).drop(columns="seeds")
    assert sorted(rows) == sorted(table.itertuples(index=False, name=None))


def test_256_facts_in_8_cells_take_at_most_2_mb():
    rng, forms = (
        np.random.default_rng(0),
        [*(f"paraphrase:{i}" for i in range(9)), "prompt", "choice", "few_shot:shown"],
    )
    keys = [(f"cell {c}", f"Some Subject{f}", "city", f"city {f % 40}", state, form)
            for c in range(8) for state in ("original", "asked", "relearning", "quantization") for form in forms
            for f in range(256)]  # fmt: skip
    frame = pd.DataFrame(keys, columns=["cell", "subject", "relation", "answer", "state", "form"])
    values = rng.random(len(frame))
    frame = frame.assign(p_true=values, correct=values.round(), top=frame["answer"], seeds=1)
    assert len(json.dumps(fact_data(frame), separators=(",", ":"))) < 2_000_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_link_opens_its_fact_as_text_in_a_browser(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(re.sub(r"<script>/\*\*.*?</script>", "", page, count=1, flags=re.S), encoding="utf-8")
    link = "/".join(quote(part, safe="") for part in ("arm", HOSTILE, "city", "Oslo"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", f"file://{path}#fact={link}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    shown = re.search(r'<div id="fact-view".*?</table>', dom, re.S)
    assert shown is not None
    assert "&lt;/script&gt;&lt;!--&lt;b&gt;Ada &amp; co, city: Oslo" in shown[0]
    assert "top: Rome &lt;i&gt;" in shown[0]
    assert "in the cell arm;" in shown[0]
    assert "original model, asked" in shown[0]
    assert "✓" in shown[0]
    assert "✗" in shown[0]
    assert "<b>" not in shown[0]


def test_cards_call_an_edit_of_weights_and_a_change_of_activations_what_they_are():
    edit = _cell("arm", "arm", 0.2, editor="inject", components=("m2", "m3"), n_selected=9, share=0.26)
    guard = _cell("arm", "arm", 0.2, editor="dynamic_guardrail", notes={"comes_off": True})
    deletion = _cell("arm", "arm", 0.2, editor="code_deletion", notes={"comes_off": False})
    assert "(2 parts, 26.0% of" in card_of(edit).purpose
    assert (
        card_of(guard).purpose == "A change of activations: dynamic_guardrail; it edits no weight, and comes off whole."
    )
    assert card_of(deletion).purpose == "A change of activations: code_deletion; it edits no weight."
