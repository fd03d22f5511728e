"""A run's numbers as pandas tables: each with the number of facts behind it and its interval, where there is one."""

import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from mechunlearn.attack.results import AttackResult
from mechunlearn.report.diagnostics import compression_table, power_shown, weight_table
from mechunlearn.report.facts import fact_table
from mechunlearn.report.numbers import (
    MISSING,
    health,
    hidden_interval,
    measured,
    null_name,
    or_missing,
    results_of,
    share_interval,
    strongest,
)
from mechunlearn.runs import Run
from mechunlearn.statistics import Interval

__all__ = [
    "arms_table", "attack_table", "compression_table", "evaluation_table", "fact_table", "power_shown",
    "verdict_table", "weight_table",
]  # fmt: skip


def verdict_table(run: Run) -> pd.DataFrame:
    """One row a cell: its verdict and the numbers to read it by.

    Numbers over facts are `Interval`s, which print as value [lower, upper] (n); D is that of the strongest
    deciding attack (lower bound simultaneous over attacks, upper bound one-sided), P(true) is a mean over the hidden
    facts before any attack (of the model in question and of its twin) and after that attack. Without a twin its
    columns are called "made-up facts before" and "made-up facts after".
    """
    rows, null = [], null_name(run)
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
                "P(true) before": or_missing(hidden_interval(cell.edited, name, before=True)),
                f"{null} before": or_missing(hidden_interval(cell.null, name, before=True)),
                "P(true) after": or_missing(hidden_interval(cell.edited, name)),
                f"{null} after": or_missing(hidden_interval(cell.null, name)),
                "retained": or_missing(measured(cell, "retain_test", "accuracy")),
                "same subject": or_missing(measured(cell, "same_subject", "accuracy")),
                "perplexity ratio": or_missing(measured(cell, "text", "perplexity_ratio", "text")),
                "health": health(cell),
            }
        )
    return pd.DataFrame(rows)


def attack_table(run: Run) -> pd.DataFrame:
    """One row a (cell, attack): D with its bounds, and mean P(true | candidates) on the hidden facts, numbers only.

    `edited_*` is the model in question, `null_*` what it is compared with, which `null` names: its equally treated
    "twin", or "made-up facts" asked of the same model. `*_lower` and `*_upper` bound a mean over facts at 95% (a fact
    is averaged over seeds first), `lower` and `upper` bound D as in `verdict.AttackRow`. An attack has `n_results`,
    one a seed and hidden part; `setting` and `step` list what they chose, the most frequent first.
    """
    rows = []
    for cell in run.cells:
        for row in cell.verdict.rows:
            results = results_of(cell.edited, row.name)
            values = {"cell": cell.name, "attack": row.name, "access": results[0].access if results else ""}
            values |= {
                "D": row.share, "lower": row.lower, "upper": row.upper, "n_facts": row.n_facts, "n_seeds": row.n_seeds,
                "n_results": len(results), "null": null_name(cell),
            }  # fmt: skip
            for who, given in (("edited", cell.edited), ("null", cell.null)):
                for when, before in (("before", True), ("after", False)):
                    interval = hidden_interval(given, row.name, before=before) or Interval(
                        value=math.nan, lower=math.nan, upper=math.nan, n=0
                    )
                    key = f"{who}_{when}"
                    values |= {key: interval.value, f"{key}_lower": interval.lower, f"{key}_upper": interval.upper}
            values |= {"decides": row.decides, "powered": row.powered, "healthy": row.healthy}
            values |= {
                "setting": "; ".join(setting for setting, _ in Counter(r.chosen for r in results).most_common()),
                "step": ", ".join(map(str, _steps(results))),
                "note": row.note,
            }
            rows.append(values)
    return pd.DataFrame(rows)


def _steps(results: Sequence[AttackResult]) -> list[int]:
    """The steps that were chosen, the most frequent first; none for an attack without steps."""
    counts = Counter(result.chosen_step for result in results)
    return [step for step, _ in counts.most_common()] if any(counts) else []


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
