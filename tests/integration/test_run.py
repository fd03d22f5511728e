"""A whole run in small, on the bundled organism: what the demo does, with fewer facts and steps."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from mechunlearn.attack.results import AttackResult
from mechunlearn.cli import app
from mechunlearn.experiment import plan_experiment, run_experiment
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.formats import save_dictionary
from mechunlearn.features.guard import load_guard
from mechunlearn.report.html import write_report
from mechunlearn.report.methods import methods_figure, methods_table
from mechunlearn.report.numbers import fact_means, strongest
from mechunlearn.runs import load_run
from mechunlearn.settings import check_settings, load_settings

SMALL = """
name = "small"
model = "atlas"
twin = "atlas-never-a"
second_twin = "atlas-never-b"
suppress = {}
[facts]
forget = "world-64"
rotate = false
[localize.attribution_patching]
[evaluate]
max_facts = 8
kinds = ["prompt"]
[edit.inject]
steps = 5
[attack.asking]
report_all_forms = false
[[arms]]
localizer = "attribution_patching"
[[arms]]
localizer = "random_mlps"
"""
NO_TWIN = """
name = "alone"
model = "atlas"
suppress = {}
[facts]
source = "world"
relation = "company_industry"
n = 24
rotate = false
[evaluate]
max_facts = 4
kinds = ["prompt"]
[attack.asking]
report_all_forms = false
[edit.inject]
steps = 5
[[arms]]
localizer = "all_mlps"
[[arms]]
localizer = "random_mlps"
budget = 0.3
[[arms]]
localizer = "random_components"
"""
GUARDED = """
name = "guarded"
model = "atlas"
twin = "atlas-never-a"
suppress = {}
[facts]
forget = "sport-hockey"
rotate = false
n = 24
[evaluate]
max_facts = 8
kinds = ["prompt"]
[attack.asking]
report_all_forms = false
[guard.dynamic_guardrail]
dictionary = "FOLDER"
rule_options = { ratio_percentile = 0.0 }
gate = "none"
strength = 3.0
data_share = 0.1
[[arms]]
guard = "dynamic_guardrail"
[[arms]]
guard = "dynamic_guardrail"
label = "nothing"
options = { dictionary = "FOLDER", rule = "retain_sparsity", rule_options = { most_retained = 0.0 }, gate = "none" }
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    settings = check_settings(tomllib.loads(SMALL), "small")
    return settings, folder, run_experiment(settings, folder)


def test_known_truths_come_out_as_they_are(run):
    _, _, result = run
    assert str(result.cell("original").verdict) == "hidden (still expressed)"
    assert result.cell("second-twin").verdict.label in ("removed", "inconclusive")


def test_random_arms_edit_exactly_as_many_parameters(run):
    _, _, result = run
    localized, control = (result.cell(f"inject-{name}") for name in ("attribution_patching", "random_mlps"))
    assert localized.n_selected == control.n_selected > 0


def test_without_a_twin_made_up_facts_are_the_null(tmp_path):
    settings = check_settings(tomllib.loads(NO_TWIN), "alone")
    result = run_experiment(settings, tmp_path / "alone")
    for cell in result.cells:
        assert any("made-up" in caveat for caveat in cell.verdict.caveats)
    names = ("all_mlps", "random_mlps", "random_components")
    whole, drawn, anywhere = (result.cell(f"inject-{name}") for name in names)
    assert whole.notes["A_n"] < 0.3  # ten industries
    assert all(len(cell.null) == len(cell.edited) for cell in result.cells)
    assert drawn.n_selected < whole.n_selected  # a control does not set the size of another
    assert len(anywhere.components) > 0


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    """Random directions of the stream of `atlas`."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 128, generator=g), dim=-1)
    weights = {"W_enc": directions.T.clone(), "W_dec": directions, "b_enc": torch.zeros(64), "b_dec": torch.zeros(128)}
    made = Dictionary(kind="relu", weights=weights, hook_point="blocks.3.hook_resid_post", is_folded=True)
    folder = tmp_path_factory.mktemp("dictionaries") / "random"
    save_dictionary(made, folder)
    return str(folder)


def test_a_guard_is_made_kept_and_attacked_on_the_command_line(dictionary, tmp_path):
    made, attacked = str(tmp_path / "made"), str(tmp_path / "attacked")
    options = ["gate=none", "strength=3", f"dictionary={dictionary}", "rule=count_difference", "data_share=0.1"]
    guard = ["guard", "--facts", "sport-hockey", "--out", made, *(word for one in options for word in ("--set", one))]
    found = CliRunner().invoke(app, [*guard, "--set", "rule_options={least_ratio=0}"])
    assert found.exit_code == 0, found.output
    inside = pd.read_csv(Path(made) / "evaluation.csv").set_index(["part", "form", "metric"])["mean"]
    assert inside["forget_hidden", "prompt", "p_true"] < 0.5
    attack = ["attack", "--facts", "sport-hockey", "--method", "asking", "--edit", made, "--out", attacked]
    results = []
    for command in (attack, [word for word in attack if word not in ("--facts", "sport-hockey")]):
        found = CliRunner().invoke(app, command)  # without facts: those that the guard is of
        assert found.exit_code == 0, found.output
        results.append(AttackResult.load(Path(attacked) / "asking"))
    assert results[0].hidden_before() == results[1].hidden_before()
    assert sum(results[0].hidden_before().values()) < 0.6 * len(results[0].hidden_before())
    with pytest.warns(UserWarning, match="was made on 'atlas', and atlas-codebook has other weights"):
        CliRunner().invoke(app, [*attack[:-1], str(tmp_path / "other"), "--model", "atlas-codebook"])
    for wrong, said in (
        (["--edit", str(tmp_path / "nothing")], "no folder"),
        (["--edit", made, "--out", made], "would be lost"),
        (["--edit", made, "--forgotten", "topic.csv"], "beside --facts people-256"),
    ):
        found = CliRunner().invoke(app, ["attack", "--method", "asking", "--out", attacked, *wrong])
        assert said in str(found.exception)
    assert load_guard(made).method == "dynamic_guardrail"


def test_guards_are_judged_like_edits(dictionary, tmp_path):
    """With random directions, clamped hard: the facts are not answered any more; and one that finds nothing."""
    settings = check_settings(tomllib.loads(GUARDED.replace("FOLDER", dictionary)), "guarded")
    assert list(plan_experiment(settings)["arms"]["budget"]) == ["none: the weights stay"] * 2
    result = run_experiment(settings, tmp_path / "guarded")
    original, clamped, nothing = (result.cell(name) for name in ("original", "dynamic_guardrail", "nothing"))
    assert clamped.editor == "dynamic_guardrail"
    assert clamped.evaluation.mean("forget_hidden", "p_true") < original.evaluation.mean("forget_hidden", "p_true") / 2
    assert nothing.evaluation.mean("forget_hidden", "p_true") > 0.98
    page = write_report(load_run(tmp_path / "guarded"), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "dynamic_guardrail" in page
    table = methods_table([load_run(tmp_path / "guarded")]).set_index("cell")
    assert table.loc["dynamic_guardrail", "with the weights"].value > 0.98  # it comes off
    assert table.loc["dynamic_guardrail", "forgotten"].value < 0.5
    assert list(table.index[table["seconds"].notna()]) == ["dynamic_guardrail"]  # "nothing" found nothing to clamp
    assert len(methods_figure(table.reset_index()).data[0].y) == 1


def test_runs_are_compared_in_one_table(run, tmp_path):
    _, folder, result = run
    out = CliRunner().invoke(app, ["compare", str(folder), str(folder), "--out", str(tmp_path / "compared")])
    assert out.exit_code == 0, out.output
    table = pd.read_csv(tmp_path / "compared" / "methods.csv")
    assert list(table["cell"]) == 2 * [cell.name for cell in result.cells]
    edited = table.loc[table["cell"] == "inject-random_mlps"].iloc[0]
    assert edited["retained lower"] <= edited["retained"] <= edited["retained upper"]
    cell = result.cell("inject-random_mlps")
    before = fact_means(one.hidden_before() for one in cell.edited if one.attack == edited["strongest attack"])
    assert edited["forgotten"] == pytest.approx(sum(before.values()) / len(before))
    original = table.loc[table["cell"] == "original"].iloc[0]
    assert edited["perplexity"] == pytest.approx(edited["perplexity ratio"] * original["perplexity"])
    assert edited["D"] == pytest.approx(strongest(cell.verdict).share)
    other = replace(result, manifest=result.manifest | {"settings": result.manifest["settings"] | {"seed": 7}})
    with pytest.raises(ValueError, match="forget different facts"):
        methods_table([result, other])


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("guard = 'dynamic_guardrial'", "Did you mean 'dynamic_guardrail'"),
        ("guard = 'dynamic_guardrail'\nlocalizer = 'all_mlps'", "or a guard"),
        ("guard = 'dynamic_guardrail'\nlabel = '../up'", "allowed are letters"),
        ("guard = 'dynamic_guardrail'\noptions = { mode = 'harder' }", "option 'mode'"),
        ("guard = 'dynamic_guardrail'\noptions = { seed = 1 }", "set the arm's `seed`"),
    ],
)
def test_wrong_guards_are_refused_before_anything_runs(arm, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_settings(tomllib.loads(f"{GUARDED.partition('[[arms]]')[0]}[[arms]]\n{arm}"), "guarded")
    assert "\n" not in str(refused.value)


def test_the_exact_effect_stands_beside_every_localizer(run):
    _, _, result = run
    assert any("attribution_patching" in line and "Spearman" in line for line in result.manifest["summary"])


def test_a_run_is_read_back_as_it_was_and_reported(run, tmp_path):
    _, folder, result = run
    again = load_run(folder)
    assert again.manifest == json.loads((folder / "manifest.json").read_text())
    assert [str(cell.verdict) for cell in again.cells] == [str(cell.verdict) for cell in result.cells]
    page = write_report(again, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "hidden (still expressed)" in page


def test_finished_cells_are_reused_and_a_rerun_gives_the_same_bytes(run):
    settings, folder, _ = run

    def files():
        return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder / "cells").rglob("*")) if p.is_file()}

    before, times = files(), {p: p.stat().st_mtime_ns for p in (folder / "cells").rglob("cell.json")}
    run_experiment(settings, folder)
    assert {p: p.stat().st_mtime_ns for p in (folder / "cells").rglob("cell.json")} == times
    run_experiment(settings, folder, fresh=True)
    fresh = files()
    for path, old in before.items():
        if path.name == "cell.json":  # seconds differ, nothing else does
            a, b = json.loads(old), json.loads(fresh[path])
            for notes in (a["notes"], b["notes"]):
                notes.pop("seconds"), notes.pop("made_seconds", None)
            assert a == b
        else:
            assert old == fresh[path], path


def test_settings_survive_a_round_trip_through_their_record(run):
    settings, _, result = run
    recorded = {key: value for key, value in result.manifest["settings"].items() if value is not None}
    recorded["facts"] = {key: value for key, value in recorded["facts"].items() if value is not None}
    recorded["arms"] = [{k: v for k, v in arm.items() if v is not None} for arm in recorded["arms"]]
    assert check_settings(json.loads(json.dumps(recorded)), "record") == settings
    assert load_settings("demo", {"facts.fold": 1}).facts.fold == 1
