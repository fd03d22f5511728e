"""Tables that compare: relearning of a model with that of its twin, and arms with each other."""

import numpy as np
import pandas as pd

from mechunlearn.attack.results import AttackResult, fact_id
from mechunlearn.comparison import compare_arms
from mechunlearn.recovery import Recovery, recovery
from mechunlearn.report.numbers import fact_means, results_of, strongest
from mechunlearn.runs import Cell, Run

# pandas has no complete types
# pyright: standard

RANDOM = ("random_mlps", "random_components")


def recovery_table(run: Run) -> pd.DataFrame:
    """One row a cell: how much of the knowledge relearning brings back along its steps, and how soon.

    nAURC is the mean recovered share along log(1 + step) (0 a model that never knew, 1 the original all along); the
    steps are Kaplan-Meier medians over facts until P(true) is half (and 80%) of the way up; savings are 1 - steps of
    the model / steps of its twin, with what censoring leaves of it. n is the number of facts.
    Cells without a relearning, or whose trainings have no two steps in common, have no row.
    """
    rows = []
    for cell in run.cells:
        found = _recovery(cell)
        if found is None:
            continue
        values: dict[str, object] = {
            "cell": cell.name,
            "n": len(found.naurc_curves),
            "nAURC": found.naurc,
            "last step": found.last_step,
        }
        for one in found.steps:
            share = f"{one.q:.0%}"
            values |= {
                f"steps to {share}": one.edited, f"twin's steps to {share}": one.twin,
                f"never {share}": one.edited_censored / one.n_curves, f"savings {share}": one.savings,
                f"savings {share} is": one.savings_known,
            }  # fmt: skip
        rows.append(values)
    return pd.DataFrame(rows)


def _recovery(cell: Cell) -> Recovery | None:
    """Fact by fact; the curves of several seeds are averaged first, and steps are those that all trainings have."""
    edited, null = (results_of(results, "relearning") for results in (cell.edited, cell.null))
    original, never = (float(cell.notes.get(key, "nan")) for key in ("A_o", "A_n"))
    if not edited or not null or cell.verdict.null != "twin" or not original > never:
        return None
    trainings = [[_curves(result) for result in results] for results in (edited, null)]
    steps = sorted(set.intersection(*(set(curves.columns) for side in trainings for curves in side)))
    if len(steps) < 2 or steps[0] != 0:
        return None
    tables: list[pd.DataFrame] = [pd.concat(side).loc[:, steps].groupby(level="fact").mean() for side in trainings]
    facts = tables[0].index.intersection(tables[1].index).sort_values()
    u, n = (table.loc[facts].to_numpy(dtype=float) for table in tables)
    return recovery(steps, u, n, original=original, null=never)


def _curves(result: AttackResult) -> pd.DataFrame:
    """P(true) by fact and step of the chosen training."""
    rows = result.rows
    rows = rows.loc[(rows["part"] == "forget_hidden") & (rows["setting"] == result.chosen)]
    ids = [fact_id(*key) for key in zip(rows["subject"], rows["relation"], rows["answer"], strict=True)]
    return rows.assign(fact=ids).pivot_table(index="fact", columns="step", values="p_true", aggfunc="mean")


def arm_comparison(run: Run) -> pd.DataFrame:
    """Every arm against a random one (the first arm without one): difference of what the strongest attack brings back.

    In units of D over the same hidden facts: minus means less came back. The interval is that of one difference; p
    (paired permutation over facts) is corrected for the number of arms by Holm. Empty with fewer than two arms.
    """
    shares: dict[str, dict[str, float]] = {}
    attacks: dict[str, str] = {}
    arms = [cell for cell in run.cells if cell.role == "arm" and cell.verdict.denominator > 0]
    for cell in arms:
        row = strongest(cell.verdict)
        if row is None or cell.verdict.null != "twin":
            continue
        u, n = (fact_means(r.hidden_scores() for r in results_of(rs, row.name)) for rs in (cell.edited, cell.null))
        shares[cell.name] = {fact: (u[fact] - n[fact]) / cell.verdict.denominator for fact in u if fact in n}
        attacks[cell.name] = row.name
    facts = sorted(set.intersection(*map(set, shares.values()))) if shares else []
    if len(shares) < 2 or len(facts) < 2:
        return pd.DataFrame()
    against = next((cell.name for cell in arms if cell.localizer in RANDOM and cell.name in shares), next(iter(shares)))
    values = {name: np.array([found[fact] for fact in facts]) for name, found in shares.items()}
    table = compare_arms(values, against=against)
    table.insert(1, "attack", [attacks[name] for name in table["arm"]])
    return table
