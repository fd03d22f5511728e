"""Single numbers of a cell, each with its interval: what tables and figures are made of."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mechunlearn.attack.results import AttackResult
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval, exact_interval, mean_interval
from mechunlearn.verdict import AttackRow, Verdict

MISSING = "\N{EN DASH}"
"""Stands for what was not measured."""
DRAWS = 1000  # of bootstraps that are shown beside a mean; the verdict's own are made with more


def null_name(run: Run | Cell) -> str:
    """What models were compared with, in a word or two: "twin", or "made-up facts" where there was none."""
    cells = (run,) if isinstance(run, Cell) else run.cells
    return "made-up facts" if any(cell.verdict.null == "proxy" for cell in cells) else "twin"


def strongest(verdict: Verdict) -> AttackRow | None:
    """The attack that brings back most, among those that can decide if there are any; None before any attack."""
    able = [row for row in verdict.rows if row.counts]
    return max(
        able or [row for row in verdict.rows if row.decides] or verdict.rows, key=lambda row: row.share, default=None
    )


def share_interval(row: AttackRow) -> Interval:
    """D of one attack with its bounds."""
    return Interval(value=row.share, lower=row.lower, upper=row.upper, n=row.n_facts)


def results_of(results: Iterable[AttackResult], attack: str) -> list[AttackResult]:
    """All results of one attack: one a seed and hidden part."""
    return [result for result in results if result.attack == attack]


def fact_means(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """P(true) by fact, averaged over the seeds that scored it: several seeds do not make a fact several."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in scores:
        for fact, value in one.items():
            values[fact].append(value)
    return {fact: math.fsum(found) / len(found) for fact, found in values.items()}


def hidden_interval(results: Sequence[AttackResult], attack: str, *, before: bool = False) -> Interval | None:
    """Mean P(true | candidates) on the hidden facts of all parts, before or after an attack; None if it was not run.

    Each fact is averaged over seeds first; the interval is over facts, and n counts them.
    """
    means = fact_means(r.hidden_before() if before else r.hidden_scores() for r in results_of(results, attack))
    return mean_interval(list(means.values()), draws=DRAWS) if means else None


def measured(cell: Cell, part: str, metric: str, form: str = "prompt") -> Interval | None:
    """One number of a cell's evaluation; exact bounds for rates of yes and no, a bootstrap for others.

    Numbers about texts (perplexity, KL) stand alone and have no interval (NaN bounds).
    """
    rows = cell.evaluation.rows
    values = rows.loc[(rows["part"] == part) & (rows["metric"] == metric) & (rows["form"] == form), "value"].to_numpy()
    if not len(values):
        return None
    if len(values) > 1 and set(values) <= {0.0, 1.0}:
        return exact_interval(int(values.sum()), len(values))
    return mean_interval(values, draws=DRAWS)


def health(cell: Cell) -> str:
    """Say "ok", or which attacks cannot be believed and why."""
    failed = [f"{row.name}: {row.note}" for row in cell.verdict.rows if not row.healthy]
    return "; ".join(failed) if failed else ("ok" if cell.verdict.rows else MISSING)


def or_missing(interval: Interval | None) -> Interval | float | str:
    """The interval; its value alone where it has no bounds; a dash where nothing was measured."""
    if interval is None:
        return MISSING
    return interval if math.isfinite(interval.lower) else interval.value
