"""The command line as users mistype it: one line, exit code 2, nothing left behind."""

import contextlib
import io
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pandas as pd
import pytest

from mechunlearn.attack.results import AttackResult
from mechunlearn.checkpoints import load_model, save_model
from mechunlearn.cli import main
from mechunlearn.cli_console import showing_progress
from mechunlearn.edit.stack_files import load_stack
from mechunlearn.sources.bundled import load_bundled
from mechunlearn.splits import load_splits
from mechunlearn.study.settings import study_models, study_presets

BROKEN = {
    "no such model": ["run", "demo", "--model", "no/such/folder/here"],
    "unknown preset": ["run", "demmo"],
    "override inside a list": ["run", "demo", "--set", "arms.0.seed=1"],
    "override inside a value": ["run", "demo", "--set", "name.x=1"],
    "no attacks": ["run", "demo", "--set", "attack={}"],
    "results below a file": ["localize", "--out", sys.executable + "/below"],
    "unknown localizer": ["localize", "--out", "out", "--method", "attribution_patch"],
    "edges by a rule there is none of": ["edges", "--out", "out", "--rule", "norm"],
    "edges with an option there is none of": ["edges", "--out", "out", "--set", "form='noise'"],
    "edges of no model": ["edges", "--out", "out", "--model", "./gone"],
    "unknown forget set or data": ["attack", "--out", "out", "--facts", "peeple-256"],
    "misspelt override": ["run", "demo", "--set", "sead=3"],
    "more facts than there are": ["run", "demo", "--set", "facts.forget=''", "--set", "facts.n=99999"],
    "check of no model": ["organism", "check", "atlos/at/las"],
    "check on facts there are none of": ["organism", "check", "atlas", "--facts", "nothing.csv"],
    "card of something that is no organism": ["organism", "check", "./nowhere", "--card"],
    "organism nobody knows": ["organism", "train", "atlass"],
    "listing of nothing": ["list", "lokalizers"],
    "an edit and a checkpoint": ["attack", "--out", "out", "--original", "atlas", "--edit", "edited"],
    "an edit on top of nothing": ["edit", "--out", "out", "--components", "m1", "--on", "./gone"],
    "nothing undone": ["undo", "./gone", "--keep", "1", "--out", "out"],
    "twin without an original": ["attack", "--out", "out", "--twin", "atlas-never-a"],
    "checkpoint that is not there": ["attack", "--out", "out", "--model", "./gone", "--original", "atlas"],
    "checkpoint without word of what it forgot": ["attack", "--out", "out", "--original", "atlas", "--facts", "world"],
    "a forget set and a file": ["localize", "--out", "out", "--forgotten", "gone.csv"],
    "file of forgotten facts that is not there": ["localize", "--out", "o", "--facts", "world", "--forgotten", "g.csv"],
    "option that a run sets": ["run", "demo", "--set", "suppress.lora.seed=1"],
    "seed that a checkpoint's run sets": [
        "attack",
        "--out",
        "out",
        "--original",
        "atlas",
        "--set",
        "suppress.lora.seed=1",
    ],
    "unknown suppression": ["run", "demo", "--set", "suppress.lorra={}"],
    "arm of nothing": ["run", "demo", "--set", "arms=[{}]"],
    "cost of a size there is none of": ["bench", "speed", "--size", "llama-8b"],
    "cost of steps at a size there is none of": ["bench", "edit-speed", "--size", "llama-8b"],
    "cost in a format there is none of": ["bench", "speed", "--dtype", "float8"],
    "study there is none of": ["study", "plan", "sports-athlete-16"],
    "study on a model there is no file of": ["study", "plan", "sports-whole", "--model", "gemma-9b"],
    "study on a card of nothing": ["study", "plan", "sports-whole", "--card", "0"],
    "bench without a second twin": ["bench", "verdict", "--set", "second_twin='atlas'", "--set", "arms=[]"],
}


def _run(arguments, folder):
    """What the entry point does with these arguments, in this process: importing torch anew takes seconds."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    try:
        sys.argv = ["mechunlearn", *arguments]
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def _says_one_line(result, folder, *words):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


def test_the_program_itself_ends_a_mistake_with_code_2_and_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mechunlearn.cli", "run", "demmo"], cwd=tmp_path, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    _says_one_line(result, tmp_path, "demmo")


@pytest.mark.parametrize(
    ("arguments", "function", "advice"),
    [
        (["run", "demo"], "mechunlearn.experiment.run_experiment", "--set workers=1"),
        (
            ["attack", "--out", "out", "--model", "atlas-never-a", "--original", "atlas"],
            "mechunlearn.experiment.run_experiment",
            "--set workers=1",
        ),
        (["bench", "verdict"], "mechunlearn.stages.bench_verdict", "--set workers=1"),
        (["bench", "planted"], "mechunlearn.stages.bench_planted", "workers = 1 in a settings file of your own"),
        (["study", "run", "--quick"], "mechunlearn.study_stage.run", "--workers 1"),
    ],
)
def test_a_killed_worker_is_one_line_with_advice_that_the_command_takes(
    arguments, function, advice, tmp_path, monkeypatch
):
    def killed(*_args, **_options):
        raise BrokenProcessPool("a process was terminated abruptly")

    monkeypatch.setattr(function, killed)
    result = _run(arguments, tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.endswith(f"finished parts are kept: run again, perhaps with {advice}")


def test_progress_into_a_file_is_a_line_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 1.0, 25.0, 26.0, 50.0])
    monkeypatch.setattr("mechunlearn.cli_console.time.monotonic", lambda: next(now, 50.0))
    with showing_progress() as progress:
        for done in range(3):
            progress("judging: [a]", done, 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["1 of 3: judging: [a]", "2 of 3: judging: [a]"]


@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_is_one_line(case, tmp_path):
    _says_one_line(_run(BROKEN[case], tmp_path), tmp_path)
    assert not list(tmp_path.iterdir())


def test_presets_and_models_of_the_study_are_listed(tmp_path):
    everything = _run(["list"], tmp_path).stdout
    for name in (*study_presets(), *study_models()):
        assert f" {name} " in everything
    assert "google/gemma-2-9b" in _run(["list", "study models"], tmp_path).stdout
    options = _run(["list", "dynamic_guardrail"], tmp_path).stdout
    assert all(said in options for said in ("false_positive_rate", "0.05", "mean norms of the activation"))
    assert "counterfact-sequential-4x16 " in _run(["list", "study presets"], tmp_path).stdout


def test_an_empty_model_folder_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    _says_one_line(
        _run(["localize", "--model", "./empty", "--out", "out"], tmp_path), tmp_path, "./empty", "config.json"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('model = "atlas"\nmodle = 3\n', "modle"),
        ('model = "atlas"\n[mask]\nbudgte = 0.1\n', "budgte"),
        ('model = "atlas"\n[facts\n', "TOML"),
        ('model = "atlas"\n[localize.attribution_patch]\n', "attribution_patching"),
        ('model = "atlas"\n[attack.relearning]\nsteps = -1\n', "steps"),
        ('model = "atlas"\n[facts]\nn = "many"\n', "many"),
    ],
)
def test_a_broken_settings_file_is_one_line(text, word, tmp_path):
    (tmp_path / "my.toml").write_text(text)
    _says_one_line(_run(["run", "my.toml"], tmp_path), tmp_path, "my.toml", word)
    assert [p.name for p in tmp_path.iterdir()] == ["my.toml"]


def test_a_table_without_a_needed_column_is_one_line(tmp_path):
    (tmp_path / "mine.csv").write_text("subject,prompt\nAda,{} lives in\n")
    result = _run(["localize", "--facts", "mine.csv", "--out", "out"], tmp_path)
    _says_one_line(result, tmp_path, "mine.csv", "target_true")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.csv"]


def test_ones_own_facts_are_localized_edited_and_attacked(tmp_path):
    """README's commands; of a file half of the subjects are to be forgotten, so that something is retained."""
    facts = load_bundled("sports").facts[:80]
    rows = [(f.subject, f.relation, f.prompt, f.target_true) for f in facts]
    columns = ["subject", "relation", "prompt", "target_true"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "mine.csv", index=False)
    common = ["--model", "atlas", "--facts", "mine.csv"]
    quick = ["--set", "steps=2"]
    for arguments in (
        ["localize", *common, "--method", "attribution_patching", "--out", "scores"],
        ["edit", *common, *quick, "--scores", "scores/scores.safetensors", "--out", "edited", "--export"],
        ["attack", *common, *quick, "--method", "relearning", "--edit", "edited", "--out", "attacked"],
    ):
        result = _run(arguments, tmp_path)
        assert result.returncode == 0, result.stderr
        if arguments[0] == "edit":
            assert re.search(r"edited: (m\d, )*m\d \([\d,]+ weights\)", result.stdout)
    assert (tmp_path / "edited" / "checkpoint" / "model.safetensors").is_file()
    assert "hidden facts" in result.stdout
    nothing = ["edit", *common, *quick, "--scores", "scores/scores.safetensors", "--budget", "0", "--out", "out"]
    _says_one_line(_run(nothing, tmp_path), tmp_path, "budget: got 0")


def test_an_edit_on_an_edit_is_a_stack_that_is_attacked_and_undone(tmp_path):
    facts = load_bundled("sports").facts[:80]
    columns = ["subject", "relation", "prompt", "target_true"]
    table = pd.DataFrame([[getattr(f, c) for c in columns] for f in facts], columns=columns)
    table.to_csv(tmp_path / "mine.csv", index=False)
    for name, rows in (("first", table[:20]), ("second", table[20:40])):
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    common, quick = ["--model", "atlas", "--facts", "mine.csv"], ["--set", "steps=2"]
    first, second = (["--forgotten", f"{name}.csv"] for name in ("first", "second"))
    for arguments in (
        ["edit", *common, *first, *quick, "--components", "m1", "--out", "once"],
        ["edit", *common, *second, *quick, "--components", "m1,m2", "--on", "once", "--out", "twice", "--export"],
        ["attack", *common, *first, "--method", "logit_lens", "--edit", "twice", "--out", "attacked"],
        ["attack", *common, "--method", "logit_lens", "--edit", "twice", "--out", "both"],
        ["undo", "twice", "--keep", "1", "--out", "undone"],
    ):
        result = _run(arguments, tmp_path)
        assert result.returncode == 0, result.stderr
    drift = pd.read_csv(tmp_path / "twice" / "drift.csv")
    assert drift[["step", "block"]].to_numpy().tolist() == [[s, b] for s in range(3) for b in (1, 2)]
    assert (drift["kl_text"][2:] > 0).all()
    model = load_model("atlas", device="cpu")
    stack, undone, once = (load_stack(tmp_path / name) for name in ("twice", "undone", "once"))
    assert (len(stack), len(undone), len(once)) == (2, 1, 1)
    for edit in (undone.edits[0], once.edits[0]):
        assert edit.base_sha256 == model.sha256
        assert all(value.equal(stack.edits[0].values[name]) for name, value in edit.values.items())
    exported = load_model(str(tmp_path / "twice" / "checkpoint"), device="cpu")
    with stack.applied(model):
        assert exported.sha256 == model.sha256
    first_split, second_split = load_splits(tmp_path / "twice" / "splits.json")
    assert not {f.subject for f in second_split.retain_train} & {f.subject for f in first_split.forget}
    assert len(pd.read_csv(tmp_path / "undone" / "drift.csv")) == 2
    for name, forgotten in (("attacked", table[:20]), ("both", table[:40])):  # as told; else what the edits forgot
        hidden = set(AttackResult.load(tmp_path / name / "logit_lens").final()["subject"])
        assert hidden < set(forgotten["subject"])
    assert hidden & set(table["subject"][:20])
    assert hidden & set(table["subject"][20:40])
    edit = ["edit", *common, *quick, "--components", "m1", "--out", "out"]
    _says_one_line(_run([*edit, *first, "--on", "once"], tmp_path), tmp_path, "were forgotten by an earlier edit")
    _says_one_line(_run([*edit, *first, "--budget", "0.1"], tmp_path), tmp_path, "got --budget 0.1 beside --components")
    _says_one_line(_run(["undo", "once", "--keep", "1", "--out", "out"], tmp_path), tmp_path, "holds a single edit")
    (tmp_path / "once" / "splits.json").unlink()
    attack = ["attack", *common, "--method", "logit_lens", "--edit", "once", "--out", "out"]
    _says_one_line(_run(attack, tmp_path), tmp_path, "says what was forgotten")
    refused = ["edit", *common, *second, *quick, "--components", "m1", "--on", "once", "--out", "out"]
    _says_one_line(_run(refused, tmp_path), tmp_path, "has no splits.json")
    _says_one_line(_run(["undo", "twice", "--keep", "3", "--out", "out"], tmp_path), tmp_path, "allowed: 1 of the 2")


def test_edges_are_scored_printed_and_drawn(tmp_path):
    facts = load_bundled("sports").facts[:40]
    rows = [(f.subject, f.relation, f.prompt, f.target_true) for f in facts]
    table = pd.DataFrame(rows, columns=["subject", "relation", "prompt", "target_true"])
    table.to_csv(tmp_path / "mine.csv", index=False)
    table.head(12).to_csv(tmp_path / "gone.csv", index=False)
    common = ["edges", "--model", "atlas", "--facts", "mine.csv", "--forgotten", "gone.csv"]
    values = []
    for given in ([], ["--steps", "2", "--rule", "norms"]):
        result = _run([*common, *given, "--out", "circuit"], tmp_path)
        assert result.returncode == 0, result.stderr
        edges = pd.read_csv(tmp_path / "circuit" / "edges.csv")
        assert edges["value"].abs().is_monotonic_decreasing
        assert f"largest 10 of {len(edges)}" in result.stdout
        printed = [line.split() for line in result.stdout.splitlines()]
        assert [edges["writer"][0], edges["reader"][0]] in [words[1:4:2] for words in printed]
        assert "Circuit: the strongest edges" in (tmp_path / "circuit" / "circuit.html").read_text(encoding="utf-8")
        values.append(edges.set_index(["writer", "reader"])["value"])
    assert not values[0].eq(values[1]).all()
    for wrong in (["--rule", "norm"], ["--steps=-1"], ["--set", "batch_size=0"]):
        _says_one_line(_run([*common, *wrong, "--out", "other"], tmp_path), tmp_path, "edges: option", "allowed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circuit", "gone.csv", "mine.csv"]


def test_any_model_can_be_checked_on_ones_own_facts(tiny_model, tiny_facts, tmp_path):
    """A random model knows nothing, and the check says so instead of failing."""
    save_model(tiny_model("gpt2"), tmp_path / "mine")
    rows = [(f.subject, f.relation, f.prompt, f.target_true) for f in tiny_facts]
    pd.DataFrame(rows, columns=["subject", "relation", "prompt", "target_true"]).to_csv(tmp_path / "mine.csv")
    result = _run(["organism", "check", "./mine", "--facts", "mine.csv"], tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / ".runs" / "checks" / "mine"
    table = pd.read_csv(folder / "check.csv").set_index("criterion")
    assert table.loc["knows, prompt", "outcome"] == "fails"
    assert (folder / "check.html").stat().st_size > 10_000
    own = _run(["organism", "check", "./mine", "--facts", "mine.csv", "--out", "."], tmp_path)
    _says_one_line(own, tmp_path, "not made by mechunlearn", "choose another")
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    twice = _run(["organism", "check", "./mine", "--facts", "mine.csv", "--facts", "./mine.csv"], tmp_path)
    _says_one_line(twice, tmp_path, "different names")
    card = _run(["organism", "check", "./mine", "--facts", "mine.csv", "--card"], tmp_path)
    _says_one_line(card, tmp_path, "--card", "organism train")


def test_a_checkpoint_that_another_tool_made_is_judged_against_its_original(tmp_path):
    edited = ["edit", "--model", "atlas", "--facts", "world-64", "--components", "m2", "--set", "steps=2", "--export"]
    assert _run([*edited, "--out", "edited"], tmp_path).returncode == 0
    small = ["suppress={}", "evaluate.max_facts=8", "attack.asking.report_all_forms=true"]
    options = [word for pair in small for word in ("--set", pair)]
    pair = ["--model", "edited/checkpoint", "--original", "atlas", "--facts", "world-64", "--method", "asking"]
    judged = _run(["attack", *pair, "--out", "judged", *options], tmp_path)
    assert judged.returncode == 0, judged.stderr
    verdicts = pd.read_csv(tmp_path / "judged" / "verdicts.csv").set_index("cell")
    assert set(verdicts.index) == {"original", "edited"}
    assert verdicts.loc["original", "verdict"] == "hidden (still expressed)"  # and no twin was needed to see it
    page = (tmp_path / "judged" / "report.html").read_text(encoding="utf-8")
    assert "made-up facts" in page
    facts = pd.read_csv(tmp_path / "judged" / "facts.csv")
    assert {"original", "asked"} <= set(facts["state"])
    assert facts["form"].nunique() > 3
    assert set(facts.loc[facts["cell"] == "edited", "subject"]) == set(
        facts.loc[facts["cell"] == "original", "subject"]
    )
