"""A run's numbers as pandas tables: each with the number of facts behind it and its interval, where there is one."""

import math
from collections.abc import Sequence

import pandas as pd

from mechunlearn.attack.results import AttackResult
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval, exact_interval, mean_interval
from mechunlearn.verdict import AttackRow, Verdict

MISSING = "\N{EN DASH}"
"""Stands in `verdict_table` for what was not measured."""
DRAWS = 1000  # of bootstraps that are shown beside a mean; the verdict's own are made with more


def verdict_table(run: Run) -> pd.DataFrame:
    """One row a cell: its verdict and the numbers to read it by.

    Numbers over facts are `Interval`s, which print as value [lower, upper] (n); D is that of the strongest
    deciding attack (lower bound simultaneous over attacks, upper bound one-sided), P(true) is a mean over the hidden
    facts before any attack (of the model in question and of its twin) and after that attack.
    """
    rows = []
    for cell in run.cells:
        row = strongest(cell.verdict)
        name = row.name if row else ""
        rows.append(
            {
                "cell": cell.name,
                "verdict": str(cell.verdict),
                "edited share": f"{100 * cell.share:.1f}%" if cell.n_selected else MISSING,
                "strongest attack": name or MISSING,
                "D": share_interval(row) if row else MISSING,
                "P(true) before": _or_missing(hidden_interval(cell.edited, name, before=True)),
                "twin before": _or_missing(hidden_interval(cell.null, name, before=True)),
                "P(true) after": _or_missing(hidden_interval(cell.edited, name)),
                "twin after": _or_missing(hidden_interval(cell.null, name)),
                "retained": _or_missing(measured(cell, "retain_test", "accuracy")),
                "same subject": _or_missing(measured(cell, "same_subject", "accuracy")),
                "perplexity ratio": _or_missing(measured(cell, "text", "perplexity_ratio", "text")),
                "health": health(cell),
            }
        )
    return pd.DataFrame(rows)


def attack_table(run: Run) -> pd.DataFrame:
    """One row a (cell, attack): D with its bounds, and mean P(true | candidates) on the hidden facts, numbers only.

    `edited_*` is the model in question, `twin_*` its equally treated twin; `*_lower` and `*_upper` bound a mean over
    facts at 95%, `lower` and `upper` bound D as in `verdict.AttackRow`.
    """
    rows = []
    for cell in run.cells:
        for row in cell.verdict.rows:
            first = next((result for result in cell.edited if result.attack == row.name), None)
            values = {"cell": cell.name, "attack": row.name, "access": first.access if first else ""}
            values |= {
                "D": row.share,
                "lower": row.lower,
                "upper": row.upper,
                "n_facts": row.n_facts,
                "n_seeds": row.n_seeds,
            }
            for who, results in (("edited", cell.edited), ("twin", cell.null)):
                for when, before in (("before", True), ("after", False)):
                    interval = hidden_interval(results, row.name, before=before) or Interval(
                        value=math.nan, lower=math.nan, upper=math.nan, n=0
                    )
                    key = f"{who}_{when}"
                    values |= {key: interval.value, f"{key}_lower": interval.lower, f"{key}_upper": interval.upper}
            values |= {"decides": row.decides, "powered": row.powered, "healthy": row.healthy}
            values |= {
                "setting": first.chosen if first else "",
                "step": first.chosen_step if first else 0,
                "note": row.note,
            }
            rows.append(values)
    return pd.DataFrame(rows)


def evaluation_table(run: Run) -> pd.DataFrame:
    """One row a (cell, part, form, metric): mean, 95% interval over facts, n."""
    frames = [cell.evaluation.table().assign(cell=cell.name) for cell in run.cells]
    columns = ["cell", "part", "form", "metric", "mean", "lower", "upper", "n"]
    return (
        pd.concat(frames, ignore_index=True).reindex(columns=columns)
        if frames
        else pd.DataFrame(columns=pd.Index(columns))
    )


def arms_table(run: Run) -> pd.DataFrame:
    """One row a cell, controls included: what was edited, how much of the model that is, and what it did when asked.

    `forgotten` is accuracy on the hidden facts when just asked, `retained` on facts about other subjects,
    `same_subject` on other facts about the forgotten subjects, `edit_success` how often the edit's target beats the
    true answer; each with its exact 95% bounds and n. NaN where a cell has no such number.
    """
    asked = {
        "forgotten": ("forget_hidden", "accuracy"),
        "retained": ("retain_test", "accuracy"),
        "same_subject": ("same_subject", "accuracy"),
        "edit_success": ("forget_hidden", "edit_success"),
    }
    rows = []
    for cell in run.cells:
        values: dict[str, object] = {
            "cell": cell.name,
            "role": cell.role,
            "localizer": cell.localizer or "",
            "editor": cell.editor or "",
            "components": " ".join(cell.components),
            "n_selected": cell.n_selected,
            "share": cell.share,
        }
        for name, (part, metric) in asked.items():
            found = measured(cell, part, metric) or Interval(value=math.nan, lower=math.nan, upper=math.nan, n=0)
            values |= {
                name: found.value,
                f"{name}_lower": found.lower,
                f"{name}_upper": found.upper,
                f"{name}_n": found.n,
            }
        for name, part in (("kl_text", "text"), ("kl_retained", "retain_test")):
            found = measured(cell, part, "kl", "text")
            values[name] = found.value if found else math.nan
        rows.append(values)
    return pd.DataFrame(rows)


def strongest(verdict: Verdict) -> AttackRow | None:
    """The attack that brings back most, among those that can decide if there are any; None before any attack."""
    able = [row for row in verdict.rows if row.decides and row.healthy and (row.powered or row.zero_budget)]
    return max(
        able or [row for row in verdict.rows if row.decides] or verdict.rows, key=lambda row: row.share, default=None
    )


def share_interval(row: AttackRow) -> Interval:
    """D of one attack with its bounds."""
    return Interval(value=row.share, lower=row.lower, upper=row.upper, n=row.n_facts)


def hidden_interval(results: Sequence[AttackResult], attack: str, *, before: bool = False) -> Interval | None:
    """Mean P(true | candidates) on the hidden facts before or after an attack; None if it was not run."""
    values: list[float] = []
    for result in results:
        if result.attack == attack:
            values += (result.hidden_before() if before else result.hidden_scores()).values()
    return mean_interval(values, draws=DRAWS) if values else None


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


def _or_missing(interval: Interval | None) -> Interval | float | str:
    if interval is None:
        return MISSING
    return interval if math.isfinite(interval.lower) else interval.value
