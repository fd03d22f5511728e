import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from mechunlearn import experiment, study_stage
from mechunlearn.cli import app
from mechunlearn.edit import EDITORS
from mechunlearn.edit.training import Diverged
from mechunlearn.metrics import known_facts, score_facts
from mechunlearn.sources.loading import load_facts
from mechunlearn.study import jobs
from mechunlearn.study.arms import ARMS, LEAST_SUBJECTS, LOOKUP, arm_named, n_matched, probed_facts, ranked_components
from mechunlearn.study.claims import CLAIMS, DOES_NOT, HOLDS, OPEN, claim_table, published
from mechunlearn.study.deals import Deal, _elsewhere
from mechunlearn.study.jobs import Job, Outcome, carry_out, exact_mask, is_done, with_false_labels
from mechunlearn.study.parts import Found, Line, Part, line_counts, lines, parts_of
from mechunlearn.study.run import run_study
from mechunlearn.study.settings import load_study, study_presets
from mechunlearn.study.tables import StudyTables, arm_table, difference_table, limits
from mechunlearn.study.tuner import editor_options, score, trial_options
from mechunlearn.study.verdicts import accepted, levels_before


@pytest.mark.parametrize("preset", study_presets())
def test_every_preset_validates_on_its_model(preset):
    study, model = load_study(preset)
    assert study.task in model.tasks
    assert parts_of([(study, model)], Path())[0].names


def test_a_presets_batch_is_the_tasks_unless_it_has_its_own():
    for preset, rows in (("counterfact-64", 32), ("counterfact-sequential-4x16", 16)):
        study, model = load_study(preset)
        (part,) = parts_of([(study, model)], Path())
        assert editor_options(part.arms[0], study, model.tasks[study.task])["batch_size"] == rows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "gema-7b"}, "Did you mean 'gemma-7b'"),
        ({"seeds": 0}, "key 'seeds': got 0"),
        ({"task": "sprots"}, "key 'task'"),
        ({"n_seeds": 3}, "unknown key 'n_seeds'"),
        ({"blocks": 17}, "key 'blocks': got 17, allowed: at most 8, half of n"),
        ({"blocks": 9}, "key 'blocks': got 9"),
    ],
)
def test_a_mistake_in_a_preset_is_one_line(changes, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        load_study("sports-athletes-16", **changes)
    assert "\n" not in str(error.value)


def test_arms_without_fact_lookup_or_unknown_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="need lookup-probe"):
        parts_of([load_study("quick", arms=["random-mlps"])], tmp_path)
    with pytest.raises(ValueError, match=r"unknown arm 'lookup_probe'\. Did you mean 'lookup-probe'"):
        parts_of([load_study("quick", arms=["lookup_probe"])], tmp_path)


def test_a_preset_says_which_of_its_arms_are_attacked_at_the_standard_level_too(monkeypatch, tmp_path):
    monkeypatch.setattr(Part, "located", lambda self, seed: {name: [["m1"]] for name in self.names})
    monkeypatch.setattr(Part, "n_entries", lambda self, name, seed: None)
    attacked = {}
    for named in ([], ["forget"]):
        study, model = load_study("beyond-forget", standard_arms=named)
        (part,) = parts_of([(study, model)], tmp_path)
        made = lines(part, {arm.name: {} for arm in part.arms})
        standard = [line for line in made if line.level == "standard"]
        assert len(standard) == line_counts(study, model, part.arms)["standard"]
        attacked["".join(named)] = {line.arm for line in standard if line.edited.blocks}
    assert attacked == {"": {"lookup-probe"}, "forget": {"lookup-probe", "forget"}}
    with pytest.raises(ValueError, match="key 'standard_arms': got 'rome', allowed: its arms, lookup-probe, forget"):
        parts_of([load_study("beyond-forget", standard_arms=["rome"])], tmp_path)


@pytest.mark.parametrize("name", [arm.name for arm in ARMS])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_matched_arms_edit_exactly_as_many_entries_as_fact_lookup(name, architecture, tiny_model, split):
    model, arm = tiny_model(architecture), arm_named(name)
    task = load_study("quick")[1].tasks["athletes"].model_copy(update={"n_mlps": 2})
    components = ranked_components(model, split, arm, task, seed=0)
    mask = exact_mask(model, components, n_matched(model, task, arm) if arm.matched else None)
    if arm.matched:
        assert mask.n_selected == n_matched(model, task, arm)
    else:
        assert mask.n_selected > n_matched(model, task, arm)
    sublayer = {"neuron": "mlp", "head": "attention"}  # of a component that was cut
    assert all(sublayer.get(c.kind, c.kind) in arm.kinds for c in mask.components)


def test_every_editor_is_compared_with_as_many_trials_that_it_takes():
    study, model = load_study("editors")
    arms = [arm_named(name) for name in study.arms]
    assert sorted(arm.editor for arm in arms) == sorted(EDITORS.names())
    task = model.tasks[study.task]
    for arm in arms:
        tried = [editor_options(arm, study, task) | options for options in trial_options(arm, task)]
        assert len(tried) == len(task.trials)
        assert len({str(options) for options in tried}) == len(tried)
        for options in tried:
            EDITORS.get(arm.editor).validate(options)


def test_an_editor_that_teaches_no_wrong_answer_is_not_tuned_to_give_it():
    shy, bold = (
        {"forget": 0.1, "edit": 0.0, "maintain": 0.9, "score": 0.8},
        {"forget": 0.2, "edit": 0.9, "maintain": 0.9},
    )
    bold |= {"score": 1.6}
    teaching, forgetting = arm_named(LOOKUP), arm_named("forget")
    assert score(teaching, bold) > score(teaching, shy)
    assert score(forgetting, bold) < score(forgetting, shy)


def test_draws_are_drawn_anew_and_again(tiny_model, split):
    model, arm = tiny_model(), arm_named("random-mlps#3")
    task = load_study("quick")[1].tasks["athletes"].model_copy(update={"n_mlps": 1})
    found = [ranked_components(model, split, arm, task, seed=s, draw=d) for s in range(4) for d in range(4)]
    assert len(set(found)) > 1
    assert found[5] == ranked_components(model, split, arm, task, seed=1, draw=1)


def test_the_probe_sees_known_facts_of_the_relations_and_no_answer_of_few_subjects(split):
    base, subjects = replace(split.retain_train[0], choices=(), target_new=None), LEAST_SUBJECTS
    made = {answer: [replace(base, relation="r", subject=f"{answer}{i}", target_true=answer) for i in range(n)]
            for answer, n in (("a", subjects), ("b", subjects), ("c", subjects - 1))}  # fmt: skip
    other = replace(base, relation="other")
    dealt = replace(split, forget_shown=(made["a"][0],), attack_dev=(), forget_hidden=(),
                    retain_train=(*made["a"][1:], *made["b"], *made["c"], other), retain_test=(other,))  # fmt: skip
    assert set(probed_facts(dealt)) == {*made["a"], *made["b"]}


def test_false_labels_reach_all_that_an_attacker_trains_on_and_no_hidden_fact(split):
    false = with_false_labels(split, 0)
    assert false.forget_hidden == split.forget_hidden
    for part in ("forget_shown", "attack_dev", "retain_train"):
        before, after = getattr(split, part), getattr(false, part)
        assert [f.subject for f in before] == [f.subject for f in after]
        assert all(a.target_true != b.target_true for a, b in zip(before, after, strict=True))
    shown = zip(split.forget_shown, false.forget_shown, strict=True)
    assert all(after.target_true == before.target_new for before, after in shown)


def test_jobs_differ_where_results_do_and_nowhere_else():
    study, model = load_study("sports-athletes-16")
    job = Job(study=study, model=model, seed=0, blocks=(("m1", "m2"),), options={"steps": 3})
    assert job.digest == replace(job, study=study.model_copy(update={"name": "other", "seeds": 9})).digest
    changes = ({"seed": 1}, {"on": "twin"}, {"level": "standard"}, {"blocks": (("m1",),)}, {"options": {}},
               {"n_entries": 5},
               {"editor": "forget"}, {"false_labels": True}, {"suppression": "lora"})  # fmt: skip
    assert len({job.digest, *(replace(job, **change).digest for change in changes)}) == 1 + len(changes)


def test_what_side_effects_are_measured_with_decides_a_job_and_is_looked_for_first(tmp_path):
    study, model = load_study("quick")
    missing = model.model_copy(update={"side_effects": {str(tmp_path / "trivia.json"): "auto"}})
    jobs_of = [Job(study=study, model=about, seed=0) for about in (model, missing)]
    assert jobs_of[0].digest != jobs_of[1].digest
    with pytest.raises(FileNotFoundError, match=r"trivia\.json"):
        run_study(parts_of([(study, missing)], tmp_path), workers=1)
    if find_spec("lm_eval") is None:
        capable = model.model_copy(update={"capability": {"sciq": 10}})
        with pytest.raises(ValueError, match=r"needs lm-eval; pip install"):
            run_study(parts_of([(study, capable)], tmp_path), workers=1)
    assert not list(tmp_path.iterdir())


def test_known_trivia_shows_side_effects(tiny_model, tmp_path):
    trivia = [{"question": f"What is {i}?", "answer": answer, "sport": "golf"} for i, answer in enumerate("abcd")]
    (tmp_path / "trivia.json").write_text(json.dumps(trivia))
    model = tiny_model()
    found = _elsewhere(model, {"city", "plays_sport", "animal_class"}, {str(tmp_path / "trivia.json"): "auto"})
    facts = load_facts(tmp_path / "trivia.json")
    assert [fact for fact in found if fact.relation == "golf"] == list(known_facts(model, facts))
    (favorite,) = {score for score in score_facts(model, facts)["top"]} if len(facts) else ("",)
    assert [fact.target_true for fact in found] == [favorite]


def test_presets_run_with_their_own_device_and_workers_unless_told_otherwise(tmp_path):
    text = 'task = "athletes"\nn = 16\nmodel = "atlas-quick"\narms = ["lookup-probe"]\ndevice = "cpu"\nworkers = '
    names = [str(tmp_path / f"{n}.toml") for n in (1, 3)]
    for name, n in zip(names, (1, 3), strict=True):
        Path(name).write_text(f"{text}{n}\n")
    parts = study_stage.chosen_parts(names, tmp_path)
    assert [(part.study.device, part.study.workers) for part in parts] == [("cpu", 1), ("cpu", 3)]
    assert study_stage.workers_of(parts) == 3
    assert study_stage.workers_of(study_stage.chosen_parts(names, tmp_path, workers=5)) == 5


def test_on_cuda_no_second_process_loads_the_models_again(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "choose_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))
    parts = [study_stage.chosen_parts(["quick"], tmp_path, device=name, workers=4) for name in ("cpu", "auto")]
    assert list(map(study_stage.workers_of, parts)) == [4, 1]
    assert study_stage.workers_of([*parts[0], *parts[1]]) == 1


def test_the_command_leaves_device_and_workers_to_the_presets(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study_stage, "chosen_parts", lambda *_, **options: asked.append(options) or [])
    for arguments in (["run"], ["run", "--device", "cpu", "--workers", "3"]):
        CliRunner().invoke(app, ["study", *arguments, "--out", str(tmp_path / "out")])
    assert [(options["device"], options["workers"]) for options in asked] == [(None, None), ("cpu", 3)]


def test_a_job_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    study, model = load_study("quick")
    job = Job(study=study, model=model, seed=0)
    (tmp_path / job.digest).mkdir()
    (tmp_path / job.digest / "record.json").write_text("{}")
    monkeypatch.setattr(jobs, "dealt", lambda *_: pytest.fail("it was done again"))
    assert is_done(job, tmp_path)
    carry_out([job], tmp_path)


def long_rows(values: dict[str, list[float]], measure: str = "multiple choice, edit") -> pd.DataFrame:
    """Five seeds of other facts each: arm -> one value a fact."""
    rows = [
        ("p", arm, seed, "quick", f"{seed}-{i}", measure, value)
        for arm, given in values.items()
        for seed in range(5)
        for i, value in enumerate(given)
    ]
    return pd.DataFrame(rows, columns=pd.Index(["preset", "arm", "seed", "level", "fact", "measure", "value"]))


def test_differences_are_paired_by_fact_and_mean_over_seeds():
    rows = long_rows({LOOKUP: [0.9, 0.5, 0.7, 0.8], "random": [0.4, 0.3, 0.2, 0.1], "all-mlps": [0.9, 0.5, 0.7, 0.8]})
    found = difference_table(rows).set_index("arm")
    assert found.loc["random", "difference"] == pytest.approx((0.5 + 0.2 + 0.5 + 0.7) / 4)
    assert found.loc["random", "lower"] > 0
    assert found.loc["random", "p_holm"] < 0.01
    assert found.loc["all-mlps", "same"]
    assert not found.loc["random", "same"]
    arms = arm_table(rows).set_index("arm")
    assert arms.loc[LOOKUP, "mean"] == pytest.approx(0.725)
    assert (arms["n_seeds"] == 5).all()


def test_intervals_end_where_a_measure_does():
    values = {LOOKUP: [0.0, 0.0, 0.0, 1.0], "random": [1.0, 1.0, 1.0, 0.0]}
    for measure, least, most in (("forget", 0, 1), ("relearning, excess", -1, 1), ("KL", 0, math.inf)):
        assert limits(measure) == (least, most)
        assert arm_table(long_rows(values, measure))[["lower", "upper"]].stack().between(least, most).all()
    assert arm_table(long_rows({LOOKUP: [0.0, 0.0, 0.0, 9.0]}, "KL"))["upper"].max() > 1


def test_a_measure_of_one_fact_is_not_tested_and_no_arms_leave_an_empty_table(tmp_path):
    found = difference_table(long_rows({LOOKUP: [0.5], "random": [0.1]}).assign(fact="only"))
    assert found[["p", "p_holm"]].isna().all(axis=None)
    alone = difference_table(long_rows({LOOKUP: [0.5, 0.4]}))
    assert not len(alone)
    alone.to_csv(tmp_path / "alone.csv", index=False)
    assert list(pd.read_csv(tmp_path / "alone.csv")) == list(alone)


def claims_of(rows: pd.DataFrame) -> pd.DataFrame:
    empty = pd.DataFrame()
    tables = StudyTables(
        arms=arm_table(rows),
        differences=difference_table(rows),
        verdicts=empty,
        tuning=empty,
        components=empty,
        draws=empty,
    )
    return claim_table(tables).set_index(["claim", "against"])


def test_a_claim_holds_fails_or_stays_open():
    good, bad, noisy = [0.9, 0.8, 0.85, 0.95], [0.2, 0.1, 0.15, 0.3], [0.95, 0.75, 0.9, 0.9]
    found = claims_of(long_rows({LOOKUP: good, "random": bad, "all-mlps": noisy, "nonlocalized": good}))
    words = found.loc["format generalization", "word"]
    assert words["random"] == HOLDS
    assert words["all-mlps"] == OPEN
    assert words["nonlocalized"] == OPEN
    assert "same edit" in found.loc[("format generalization", "nonlocalized"), "why"]
    worse = claims_of(long_rows({LOOKUP: bad, "random": good}))
    assert worse.loc[("format generalization", "random"), "word"] == DOES_NOT


def test_an_unhealthy_attack_decides_no_claim():
    values = {LOOKUP: [0.1, 0.1, 0.2, 0.1], "random": [0.8, 0.7, 0.9, 0.8]}
    rows = long_rows(values, "relearning, excess")
    healthy = long_rows({arm: [1.0] for arm in values}, "relearning, healthy").assign(fact="")
    assert claims_of(pd.concat([rows, healthy])).loc[("relearning resistance", "random"), "word"] == HOLDS
    healthy.loc[0, "value"] = 0.0
    assert claims_of(pd.concat([rows, healthy])).loc[("relearning resistance", "random"), "word"] == OPEN


def test_an_unfinished_edit_decides_no_claim():
    values = {LOOKUP: [0.9, 0.8, 0.85, 0.95], "random": [0.2, 0.1, 0.15, 0.3]}
    for edited, word in ((0.9, HOLDS), (0.4, OPEN)):
        given = long_rows({LOOKUP: [0.99] * 4, "random": [edited] * 4}, "edit")
        found = claims_of(pd.concat([long_rows(values), given])).loc[("format generalization", "random")]
        assert found["word"] == word
        assert ("unfinished at its end: random" in found["why"]) == (word == OPEN)


def test_without_a_twin_claims_on_attacks_cannot_be_told():
    values = {LOOKUP: [0.1, 0.1, 0.2, 0.1], "random": [0.8, 0.7, 0.9, 0.8]}
    found = claims_of(long_rows(values, "relearning"))  # no null, no excess
    assert list(found["word"]) == [OPEN]
    assert "no twin" in found.loc[("relearning resistance", "random"), "why"]


def outcome(**record: object) -> Outcome:
    return Outcome(record=record, evaluation=None, attacks=())


def found(edited: Outcome, null: Outcome) -> Found:
    study, model = load_study("quick")
    job = Job(study=study, model=model, seed=0, suppression="lora")
    twins = replace(job, on="twin")
    line = Line(preset="quick", arm="suppressed-lora", seed=0, level="quick", edited=job, null=twins)
    return Found(line=line, edited=edited, null=null)


def test_a_control_that_is_refused_under_one_seed_is_not_accepted():
    fine, refused = (outcome(acceptance={"reason": why}) for why in ("", "retained facts fell from 100% to 94%"))
    assert accepted([found(fine, outcome()), found(fine, outcome())])
    assert not accepted([found(fine, outcome()), found(refused, outcome())])


def test_an_edit_is_held_against_what_was_known_among_its_own_candidates():
    model, twin = ({"all": 0.9, "without target": 0.95}, {"all": 0.1, "without target": 0.2})
    before = [found(outcome(hidden_p_true=model), outcome(hidden_p_true=twin))]
    assert levels_before(before, edited=True) == {"original": 0.95, "null_before": 0.2}
    assert levels_before(before, edited=False) == {"original": 0.9, "null_before": 0.1}


def test_a_trial_that_diverges_has_no_score_and_an_edit_that_does_ends_the_study(
    tmp_path, monkeypatch, tiny_model, split
):
    study, model = load_study("quick")
    deal = Deal(model=tiny_model(), twin=None, split=split, blocks=(split,), elsewhere=())
    monkeypatch.setattr(jobs, "dealt", lambda *_: deal)
    wild = Job(study=study, model=model, seed=0, blocks=(("m1",),), options={"steps": 30, "learning_rate": 1e30})
    trial = replace(wild, level="tune")
    carry_out([trial], tmp_path)
    record = Outcome.load(tmp_path / trial.digest).record
    assert "lower the learning_rate" in record["diverged"]
    assert score(arm_named(LOOKUP), record["score"]) == -math.inf
    with pytest.raises(Diverged):
        carry_out([wild], tmp_path)


def test_published_numbers_are_of_known_arms_and_probabilities():
    table = published()
    assert set(table["arm"]) <= {"lookup", *(arm.name for arm in ARMS)}
    assert table["value"].between(0, 1).all()
    assert not table.duplicated(["task", "arm", "measure"]).any()
    assert {claim.name for claim in CLAIMS} == {
        "format generalization", "relearning resistance", "latent knowledge disruption", "fewer side effects",
    }  # fmt: skip
    of = table.set_index(["task", "arm", "measure"])["value"]
    assert of["athletes", "lookup", "multiple choice, edit"] == 0.862
    assert of["counterfact", "random-mlps", "multiple choice, edit"] == 0.236
