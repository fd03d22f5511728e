"""The bench of the verdict: its cases, and how words are counted against truths."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mechunlearn.attack.results import AttackResult, Health
from mechunlearn.bench import verdict as bench
from mechunlearn.evaluate.results import Evaluation
from mechunlearn.evidence import evidence_by_attack
from mechunlearn.report.bench import bench_figure
from mechunlearn.runs import Cell
from mechunlearn.settings import load_settings
from mechunlearn.verdict import decide, demonstrate_power

N = 96


def settings():
    return load_settings("bench")


def test_every_case_has_a_truth_a_null_and_a_name_of_its_own():
    found = bench.cases(settings())
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert {case.truth for case in found} == {"knows", "never knew"}
    assert sum(case.role == "suppressed" for case in found) >= 4
    for case in found:
        assert case.null.model == "atlas-never-a", case.name
        treated_alike = (case.side.editor, case.side.components, case.side.suppression, case.side.drop_targets)
        assert treated_alike == (case.null.editor, case.null.components, case.null.suppression, case.null.drop_targets)
        assert not case.null.taught


def test_the_late_edit_leaves_the_lookup_alone():
    late = next(case for case in bench.cases(settings()) if case.name == "original-late-edit")
    assert min(int(name[1:]) for name in late.side.components) > 3  # atlas looks facts up in m1 to m3


def test_settings_without_twins_are_refused_in_one_line():
    with pytest.raises(ValueError, match="a second twin") as error:
        bench.cases(settings().model_copy(update={"second_twin": None}))
    assert "\n" not in str(error.value)


def result(attack: str, level: float, seed: int, zero_budget: bool = False) -> AttackResult:
    rng = np.random.default_rng([*attack.encode(), round(1000 * level), seed])  # no hash(): it differs by process
    rows = pd.DataFrame(
        {"subject": [f"s{i}" for i in range(N)], "relation": "r", "answer": "a", "part": "forget_hidden",
         "setting": "x", "step": 0, "p_true": np.clip(rng.normal(level, 0.05, N), 0, 1), "correct": True, "top": "a"}
    )  # fmt: skip
    return AttackResult(attack=attack, access="prompts", decides=True, zero_budget=zero_budget, rows=rows, before=rows,
                        chosen="x", health=Health(), options={}, seed=seed, notes={})  # fmt: skip


def cell(case: bench.Case, asked: float, attacked: float) -> Cell:
    def both(asked: float, attacked: float) -> tuple[AttackResult, ...]:
        return result("asking", asked, 0, zero_budget=True), result("relearning", attacked, 0)

    edited, null = both(asked, attacked), both(0.05, 0.05)
    evidence = evidence_by_attack(edited, null)
    verdict = decide(evidence, original=0.95, null_before=0.05)
    notes = {"A_o": 0.95, "A_n": 0.05, "seconds": 1.0}
    if case.role == "suppressed":
        notes["acceptance"] = {"reason": "", "direct_accuracy": 0.04, "chance": 0.04, "retained_before": 1.0,
                               "retained_after": 0.97, "probe_before": 0.3, "probe_after": 0.3}  # fmt: skip
        shown = demonstrate_power(str(case.side.suppression), evidence, original=0.95, null_before=0.05)
        notes["control"] = asdict(shown)
    evaluation = Evaluation(rows=pd.DataFrame(), options={}, model="m", facts_sha256="")
    return Cell(name=case.name, role=case.role, verdict=verdict, evaluation=evaluation, edited=edited, null=null,
                notes=notes)  # fmt: skip


def judged(levels) -> bench.VerdictBench:
    """The bench on made-up scores: `levels(case)` gives what asking and relearning find."""
    one = settings()
    cells = {case.name: cell(case, *levels(case)) for case in bench.cases(one)}
    controls, power = bench._controls(list(cells.values()), one)
    rows = [row for case in bench.cases(one) for row in bench._verdicts(case, cells[case.name], controls, one)]
    return bench.VerdictBench(verdicts=pd.DataFrame(rows), power=pd.DataFrame(power))


def as_it_is(case):
    return (0.05, 0.7) if case.truth == "knows" else (0.05, 0.05)


def test_scores_that_follow_the_truth_are_counted_as_right():
    found = judged(as_it_is)
    goals = found.goals().set_index("what")
    assert found.at()["right"].all()
    assert goals.loc["decided verdicts right", "share"] == 1
    assert goals.loc["confidently wrong", "count"] == 0
    assert goals.loc["accepted suppressions recovered", "share"] == 1
    assert set(found.verdicts["n_facts"]) == {96, 48, 24, 12}


def test_a_wrong_word_is_counted_as_wrong_and_an_open_one_as_neither():
    def levels(case):
        if case.name == "second-twin":
            return 0.05, 0.6  # would be called hidden
        return (0.05, 0.14) if case.name == "made-up-facts" else as_it_is(case)

    goals = judged(levels).goals().set_index("what")
    assert goals.loc["confidently wrong", "count"] == 1
    assert goals.loc["inconclusive", "count"] == 1
    decided = goals.loc["decided verdicts right", "of"]
    assert decided == len(bench.cases(settings())) - 1
    assert goals.loc["decided verdicts right", "share"] == pytest.approx(1 - 1 / decided)


def test_a_suppressed_model_does_not_vouch_for_itself():
    """Where relearning recovers one kind alone, that kind is left without an attack of shown power."""

    def levels(case):
        lone = case.role == "suppressed" and case.side.suppression == "lora"
        return (0.05, 0.7) if lone or (case.role != "suppressed" and case.truth == "knows") else (0.05, 0.05)

    words = judged(levels).at().set_index("case")["word"]
    assert words["suppressed-lora"] != "hidden"


def test_fewer_facts_give_fewer_decided_words():
    def levels(case):
        return (0.05, 0.2) if case.truth == "knows" else (0.05, 0.05)

    found = judged(levels)
    said = found.verdicts.assign(decided=found.verdicts["word"].isin(["hidden", "removed"]))
    decided = said.groupby("share_of_facts")["decided"].mean()
    assert decided[1.0] >= decided[0.125]


def test_seeds_with_other_numbers_of_facts_are_all_counted():
    one, two = judged(as_it_is), judged(as_it_is)
    fewer = two.verdicts.assign(seed=1, n_facts=two.verdicts["n_facts"] - 1)
    both = bench.VerdictBench(
        verdicts=pd.concat([one.verdicts, fewer]), power=pd.concat([one.power, two.power.assign(seed=1)])
    )
    assert set(both.at()["seed"]) == {0, 1}
    assert both.goals().set_index("what").loc["inconclusive", "of"] == 2 * len(bench.cases(settings()))
    assert "2 seeds" in bench_figure(both).layout.title.subtitle.text


def test_a_bench_that_decides_nothing_or_accepts_nothing_meets_no_goal():
    found = judged(as_it_is)
    silent = bench.VerdictBench(
        verdicts=found.verdicts.assign(word="invalid", right=False), power=found.power.assign(accepted=False)
    )
    met = silent.goals().set_index("what")["met"]
    for what in ("decided verdicts right", "confidently wrong", "inconclusive or invalid", "suppressed models accepted",
                 "accepted suppressions recovered", "kinds accepted and recovered"):  # fmt: skip
        assert not met[what], what
    assert found.goals()["met"].all()


def test_a_seed_that_fails_costs_the_others_nothing(monkeypatch, tmp_path):
    finished = []

    class Failing(bench.Judging):
        def start(self, tasks):
            pass

        def finish(self, _):
            if self.settings.seed == 1:
                raise ValueError("nothing left to hide")
            finished.append(self.settings.seed)
            return tuple(cell(case, *as_it_is(case)) for case in bench.cases(self.settings))

    def prepared(one, load):
        return SimpleNamespace(settings=one, splits=())

    monkeypatch.setattr(bench, "Judging", Failing)
    monkeypatch.setattr(bench, "prepare", prepared)
    monkeypatch.setattr(bench, "_task", lambda stage, case: None)
    quick = settings().model_copy(update={"workers": 1})
    with pytest.raises(ValueError, match="nothing left to hide") as error:
        bench.bench_verdict(quick, tmp_path, seeds=3)
    assert finished == [0, 2]
    assert "seed 1" in error.value.__notes__[0]
