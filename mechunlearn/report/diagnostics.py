"""Tables beside the verdict: what attacks can find, how readable the answers are, what rounding would undo."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechunlearn.attack.results import AttackResult
from mechunlearn.report.numbers import share_interval
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval

# pandas has no complete types
# pyright: standard

ACCEPTANCE = ("direct_accuracy", "chance", "retained_before", "retained_after", "probe_before", "probe_after")


@dataclass(frozen=True, kw_only=True)
class Power(Interval):
    """D of an attack on a suppressed model, and whether that shows the attack's power."""

    recovers: bool

    def __str__(self) -> str:
        return f"{super().__str__()}, {'shows power' if self.recovers else 'shows no power'}"


def power_shown(run: Run) -> pd.DataFrame:
    """Demonstrated power: one row a kind of suppression, one column an attack, holding a `Power` (None: not run).

    Before them: kind, cell, accepted, reason (why it was refused, else empty) and the numbers of
    `controls.acceptance.Acceptance` as of the first seed; NaN where a run kept none. A refused control shows no
    attack's power, however much it brings back.
    """
    cells = [cell for cell in run.cells if cell.role == "suppressed"]
    attacks = dict.fromkeys(row.name for cell in cells for row in cell.verdict.rows)
    rows = []
    for cell in cells:
        control, acceptance = _noted(cell, "control"), _noted(cell, "acceptance")
        accepted, reason = bool(control.get("accepted", True)), str(acceptance.get("reason", ""))
        values: dict[str, Any] = {
            "kind": control.get("kind", cell.name), "cell": cell.name, "accepted": accepted,
            "reason": reason or ("" if accepted else "refused under another seed"),
        }  # fmt: skip
        values |= {key: math.nan if acceptance.get(key) is None else acceptance[key] for key in ACCEPTANCE}
        found = {row.name: row for row in cell.verdict.rows}
        for name in attacks:
            row = found.get(name)
            by_bound = row is not None and row.healthy and row.lower > cell.verdict.delta
            recovers = name in control["recovered_by"] if control else by_bound
            values[name] = row and Power(**vars(share_interval(row)), recovers=recovers)
        rows.append(values)
    columns = ("kind", "cell", "accepted", "reason", *ACCEPTANCE, *attacks)
    return pd.DataFrame(rows, columns=pd.Index(columns))


def _noted(cell: Cell, key: str) -> Mapping[str, Any]:
    value = cell.notes.get(key)
    return value if isinstance(value, Mapping) else {}


def compression_table(run: Run) -> pd.DataFrame:
    """How well answers can be read off the residual stream, by code length: one row a (cell, part, site, layer).

    `model` and `null` are kappa = n log2 K / L (higher is more readable, 1 or less nothing) of the model and of what
    it is compared with, `difference` the first minus the second (Delta I), `control` the model's kappa of
    shuffled answers; means over seeds and hidden parts, `n_results` of them, with n facts coded in each (fewest).

    Source: `attacks-and-metrics.md` 4.2 no. 5; see `attack.probing`.
    """
    rows = []
    for cell in run.cells:
        ours, theirs = _codes(cell.edited), _codes(cell.null)
        for place, codes in ours.items():
            model = _mean(codes, "compression")
            null = _mean(theirs.get(place, ()), "compression")
            rows.append(
                (cell.name, *place, min(int(code["n"]) for code in codes), len(codes), model, null, model - null,
                 _mean(codes, "control_compression"))
            )  # fmt: skip
    columns = ("cell", "part", "site", "layer", "n", "n_results", "model", "null", "difference", "control")
    return pd.DataFrame(rows, columns=pd.Index(columns))


def _codes(results: Sequence[AttackResult]) -> dict[tuple[str, str, int], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        listed = result.notes.get("mdl")
        for code in listed if isinstance(listed, Sequence) else ():
            found.setdefault((code["part"], code["site"], int(code["layer"])), []).append(code)
    return found


def _mean(codes: Sequence[Mapping[str, Any]], key: str) -> float:
    return math.fsum(float(code[key]) for code in codes) / len(codes) if codes else math.nan


def weight_table(run: Run) -> pd.DataFrame:
    """One row a cell with a weight edit, over the n MLPs and attention sublayers that it changed.

    `relative_change` = ||W' - W|| / ||W||, `flips_int8` and `flips_int4` the share of weights whose integer code the
    edit changes: mean, `*_lowest` and `*_highest` over those parts. NaN where a run did not measure flips.
    """
    rows = []
    for cell in run.cells:
        changes = cell.weight_changes
        if changes is None or changes.empty:
            continue
        row: dict[str, Any] = {"cell": cell.name, "n": len(changes)}
        for key in ("relative_change", "flips_int8", "flips_int4"):
            values = changes[key] if key in changes else pd.Series([math.nan])
            row |= {key: values.mean(), f"{key}_lowest": values.min(), f"{key}_highest": values.max()}
        rows.append(row)
    return pd.DataFrame(rows)
