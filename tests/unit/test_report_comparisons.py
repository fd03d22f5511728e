"""The report's comparisons: relearning against the twin's, and arms against a random one."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mechunlearn.attack.results import AttackResult, Health
from mechunlearn.evaluate.results import Evaluation
from mechunlearn.evidence import PositiveControl, gather_evidence
from mechunlearn.report.comparisons import arm_comparison, recovery_table
from mechunlearn.runs import Cell, Run
from mechunlearn.verdict import decide

STEPS = (0, 1, 3, 7, 15)
N = 40


def curve(levels, seed: int, fold: int = 0) -> AttackResult:
    """Relearning whose facts are all at the given level at each step, give or take a little."""
    rng = np.random.default_rng([seed, fold])
    rows = pd.concat(
        pd.DataFrame(
            {"subject": [f"s{fold}-{i}" for i in range(N)], "relation": "r", "answer": "a", "part": "forget_hidden",
             "setting": "full", "step": step, "p_true": np.clip(level + rng.normal(0, 0.01, N), 0, 1),
             "correct": False, "top": ""}
        )
        for step, level in zip(STEPS, levels, strict=True)
    )  # fmt: skip
    return AttackResult(
        attack="relearning", access="weights", decides=True, rows=rows, before=rows.loc[rows["step"] == 0],
        chosen="full", chosen_step=STEPS[-1], health=Health(), options={}, seed=0, notes={}, fold=fold,
    )  # fmt: skip


def cell(name: str, ours, theirs, localizer: str | None = None) -> Cell:
    edited = tuple(curve(ours, 1, fold) for fold in (0, 1))
    null = tuple(curve(theirs, 2, fold) for fold in (0, 1))
    controls = (PositiveControl(kind="lora", recovered_by=("relearning",)),)
    verdict = decide([gather_evidence(edited, null)], original=0.9, null_before=0.1, controls=controls, draws=500)
    return Cell(
        name=name, role="arm", verdict=verdict, evaluation=Evaluation(rows=pd.DataFrame(), options={}),
        edited=edited, null=null, localizer=localizer, notes={"A_o": 0.9, "A_n": 0.1},
    )  # fmt: skip


def run(*cells: Cell) -> Run:
    return Run(manifest={}, scores={}, agreement=pd.DataFrame(), cells=cells)


FLAT = (0.1,) * len(STEPS)


def test_a_model_that_never_left_recovers_all_along_and_one_that_never_knew_nothing():
    table = recovery_table(run(cell("kept", (0.9,) * 5, FLAT), cell("gone", FLAT, FLAT))).set_index("cell")
    assert table.loc["kept", "nAURC"] == pytest.approx(1, abs=0.02)
    assert table.loc["gone", "nAURC"] == pytest.approx(0, abs=0.02)
    assert table.loc["kept", "steps to 50%"] == 0
    assert table.loc["gone", "never 50%"] == 1
    assert table.loc["kept", "last step"] == 15


def test_the_step_at_which_half_is_back_and_what_it_saves():
    table = recovery_table(run(cell("hidden", (0.1, 0.2, 0.6, 0.7, 0.9), (0.1, 0.1, 0.2, 0.3, 0.55)))).iloc[0]
    assert table["steps to 50%"] == 3
    assert table["twin's steps to 50%"] == 15
    assert table["savings 50%"] == pytest.approx(1 - 3 / 15)
    assert table["savings 50% is"] == "exact"


def test_folds_that_were_trained_for_different_steps_are_compared_at_those_they_share():
    made = cell("hidden", (0.1, 0.2, 0.6, 0.7, 0.9), (0.1, 0.1, 0.2, 0.3, 0.55))
    first, second = made.edited
    shorter = replace(second, rows=second.rows.loc[second.rows["step"] != STEPS[1]])
    table = recovery_table(run(replace(made, edited=(first, shorter)))).iloc[0]
    assert table["n"] == 2 * N
    assert table["steps to 50%"] == 3


def test_arms_are_compared_with_the_random_one_over_the_same_facts():
    better, same, drawn = ((0.1, 0.1, 0.1, 0.1, level) for level in (0.2, 0.6, 0.6))
    cells = (cell("chosen", better, FLAT, "fact_lookup_probe"), cell("other", same, FLAT, "all_mlps"),
             cell("random", drawn, FLAT, "random_mlps"))  # fmt: skip
    table = arm_comparison(run(*cells)).set_index("arm")
    assert set(table["against"]) == {"random"}
    assert table.loc["chosen", "difference"] == pytest.approx(-0.5, abs=0.05)
    assert table.loc["chosen", "p_holm"] < 0.01
    assert table.loc["other", "difference"] == pytest.approx(0, abs=0.02)
    assert table.loc["chosen", "n_facts"] == 2 * N


def test_one_arm_or_none_is_compared_with_nothing():
    assert arm_comparison(run(cell("only", FLAT, FLAT, "all_mlps"))).empty
    assert arm_comparison(run()).empty
    assert recovery_table(run()).empty
