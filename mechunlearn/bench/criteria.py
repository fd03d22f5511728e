"""What a model must show to count as knowing its facts and looking them up at the subject, one row per criterion."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.statistics import exact_interval

NEEDS = {
    "knows, prompt": (">=", 0.97),
    "knows, seen": (">=", 0.97),
    "knows, question": (">=", 0.97),
    "knows, unseen": (">=", 0.85),
    "knows, paraphrase": (">=", 0.85),
    "knows, unseen question": (">=", 0.85),
    "knows, choice": (">=", 0.90),
    "knows, choice by letter alone": ("aim at", 0.90),
    "(a) readable at the subject, above baselines": (">=", 0.50),
    "(a) the same, on facts unknown to the twin": (">=", 0.50),
    "(b) cost of ablating band": (">=", 0.60),
    "(b) cost of ablating earlier": ("<=", 0.15),
    "(b) cost of ablating later": ("<=", 0.15),
    "(b) cost of ablating band at the last token": ("<=", 0.15),
    "(b) cost of ablating MLP 0 beside the band": ("aim at <=", 0.15),
    "(c) donor's answer, few answers": (">=", 0.60),
    "(c) donor's answer, many answers": ("aim at", 0.80),
    "(d) cost of blocking attention to the subject up to the band": ("<=", 0.15),
    "(d) cost of blocking it after the band": (">=", 0.60),
    "twin: forgotten facts, distance from the base rate": ("<=", 0.05),
    "twin: kept facts, distance from the original": ("<=", 0.02),
}
"""Criterion -> what it needs; an aim is reported, not demanded. Costs are shares of the facts that were right."""

HOLDS, FAILS, MISSED, NOT_MEASURED = "holds", "fails", "aim missed", "not measured"


def share(dataset: str, criterion: str, hits: Sequence[bool] | np.ndarray, note: str = "") -> dict[str, Any]:
    """One row: the share of hits with its exact 95 % interval."""
    if not len(hits):
        return missing(dataset, criterion, "no facts to measure it on")
    found = exact_interval(int(np.sum(hits)), len(hits))
    return _row(dataset, criterion, found.value, found.lower, found.upper, found.n, note)


def difference(dataset: str, criterion: str, measured: float, n: int, note: str = "") -> dict[str, Any]:
    """One row: a difference of shares, without an interval."""
    return _row(dataset, criterion, measured, np.nan, np.nan, n, note)


def missing(dataset: str, criterion: str, reason: str) -> dict[str, Any]:
    """One row: a criterion that could not be measured, and why."""
    return _row(dataset, criterion, np.nan, np.nan, np.nan, 0, reason)


def _row(
    dataset: str, criterion: str, measured: float, lower: float, upper: float, n: int, note: str
) -> dict[str, Any]:
    sign, bound = NEEDS[criterion]
    reached = measured <= bound if sign.endswith("<=") else measured >= bound
    outcome = HOLDS if reached else MISSED if sign.startswith("aim") else FAILS
    return {
        "dataset": dataset,
        "criterion": criterion,
        "measured": round(measured, 4),
        "lower": round(lower, 4),
        "upper": round(upper, 4),
        "n": n,
        "needs": f"{sign} {bound:.2f}",
        "outcome": NOT_MEASURED if np.isnan(measured) else outcome,
        "note": note,
    }


def by_dataset(criteria: pd.DataFrame) -> pd.DataFrame:
    """The rows side by side: criterion, needs, and for each data set what was measured and what came of it."""
    cells = criteria.assign(
        cell=[
            outcome if outcome == NOT_MEASURED else f"{measured:.3f} {outcome}"
            for measured, outcome in zip(criteria["measured"], criteria["outcome"], strict=True)
        ]
    )
    order = list(dict.fromkeys(zip(criteria["criterion"], criteria["needs"], strict=True)))
    table = pd.DataFrame(order, columns=pd.Index(["criterion", "needs"]))
    for dataset in dict.fromkeys(criteria["dataset"]):
        found = cells.loc[cells["dataset"] == dataset].set_index("criterion")["cell"]
        table[dataset] = [found.get(criterion, "") for criterion in table["criterion"]]
    return table


def summary(criteria: pd.DataFrame) -> str:
    """How many criteria hold, in words."""
    counts = [(str(kind), int(n)) for kind, n in criteria["outcome"].value_counts().items()]
    held = dict(counts).get(HOLDS, 0)
    others = "; ".join(f"{n} {kind}" for kind, n in counts if kind != HOLDS)
    return f"{held} of {len(criteria)} criteria hold{'; ' + others if others else ''}"
