"""The tables of the report's sections, as they are printed."""

from typing import Any

import pandas as pd

from mechunlearn.report import tables
from mechunlearn.report.diagnostics import Power
from mechunlearn.report.numbers import MISSING, health, null_name
from mechunlearn.report.printed import Table, digits, entry, percent, plain, spread
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval

# pandas has no complete types
# pyright: standard


def verdicts(run: Run) -> Table:
    """Every cell with its strongest attack."""
    null = null_name(run)
    headings = {
        "D": "D of the strongest attack", "P(true) before": "P(true), hidden facts", f"{null} before": f"same, {null}",
        "P(true) after": "P(true), attacked", f"{null} after": f"same, {null} attacked",
    }  # fmt: skip
    frame = tables.verdict_table(run).rename(columns=headings).drop(columns="edited share", errors="ignore")
    frame["health"] = [_failed(cell) for cell in run.cells]  # why is said in the cards
    return plain(
        "Every cell: verdict, strongest attack, and what was kept. In brackets 95% bounds over facts, n facts", frame
    )


def _failed(cell: Cell) -> str:
    return ", ".join(f"{row.name} failed" for row in cell.verdict.rows if not row.healthy) or health(cell)


def power(run: Run) -> Table:
    """What each attack brings back of each kind of suppressed model, and whether the kind passed as suppressed."""
    frame = tables.power_shown(run)
    attacks = [name for name in frame.columns if any(isinstance(value, Power) for value in frame[name])]
    rows = []
    for row in frame.to_dict("records"):
        found = [_shown(row[name], accepted=row["accepted"]) for name in attacks]
        kept = [
            (
                f"{percent(row[f'{what}_before'])}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{percent(row[f'{what}_after'])}",
                "",
            )
            for what in ("retained", "probe")
        ]
        direct = (percent(row["direct_accuracy"]), f"chance {percent(row['chance'])}")
        accepted = "✓ accepted" if row["accepted"] else f"✗ refused: {row['reason']}"
        rows.append(((row["kind"], ""), (accepted, ""), *found, direct, *kept))
    columns = ("suppressed by", "as a control", *attacks, "asked directly", "kept facts", "probe, mid layer")
    caption = "Demonstrated power: D of each attack on models whose knowledge was hidden on purpose, with its bounds"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


def _shown(found: Power | None, *, accepted: bool) -> tuple[str, str]:
    if found is None:
        return MISSING, ""
    value, bounds = entry(found)
    word = "not counted" if not accepted else "✓ recovers" if found.recovers else "✗ does not"
    return f"{word} {value}", bounds


def attacks(run: Run) -> Table:
    """Every attack on every cell."""
    null = null_name(run)
    columns = (
        "cell", "attack", "D", "P(true) before", "after", f"{null} before", f"{null} after", "chosen setting", "counts",
    )  # fmt: skip
    rows = []
    for row in tables.attack_table(run).to_dict("records"):
        numbers = [
            spread(row, key, n=row["n_facts"]) for key in ("edited_before", "edited_after", "null_before", "null_after")
        ]
        share = entry(Interval(value=row["D"], lower=row["lower"], upper=row["upper"], n=row["n_facts"]))
        first, *others = row["setting"].split("; ")
        setting = f"{first or MISSING}, and {len(others)} more" if others else first or MISSING
        details = [f"step {row['step']}"] if row["step"] else []
        details += [f"{row['n_results']} results, {row['n_seeds']} seeds"] if row["n_results"] > 1 else []
        word = row["note"].partition(":")[0] or "yes"  # why its health failed is said in the card
        counts = (word, f"access: {row['access']}" if row["access"] else "")
        rows.append(((row["cell"], ""), (row["attack"], ""), share, *numbers, (setting, "; ".join(details)), counts))
    caption = "Every attack: share D brought back, and mean P(true | candidates) on the hidden facts with 95% bounds"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


def arms(run: Run) -> Table:
    """What was edited, and what it did when asked."""
    asked = {"forgotten": "forgotten facts", "retained": "facts about others", "same_subject": "same subjects"}
    columns = (
        "cell", "localizer", "edited parts", "weights", *asked.values(), "edit succeeds", "KL, text (nats/token)",
    )  # fmt: skip
    rows = []
    for row in tables.arms_table(run).to_dict("records"):
        numbers = [spread(row, key, n=row[f"{key}_n"]) for key in (*asked, "edit_success")]
        weights = (f"{row['n_selected']:,}", f"{100 * row['share']:.1f}%") if row["n_selected"] else (MISSING, "")
        start = (row["cell"], row["role"]), (row["localizer"] or MISSING, row["editor"])
        rows.append((*start, (row["components"] or MISSING, ""), weights, *numbers, entry(row["kl_text"])))
    caption = "What was edited, and accuracy when just asked, with exact 95% bounds; arms stand beside their controls"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


def weights(run: Run) -> Table:
    """How far each edit moved the weights, and how much of that rounding would keep."""
    rows = []
    for row in tables.weight_table(run).to_dict("records"):
        moved = digits(row["relative_change"]), _range(*(digits(row[f"relative_change_{end}"]) for end in ENDS))
        flips = [
            (percent(row[key]), _range(*(percent(row[f"{key}_{end}"]) for end in ENDS)))
            for key in ("flips_int8", "flips_int4")
        ]
        rows.append(((row["cell"], ""), (str(row["n"]), ""), moved, *flips))
    columns = ("cell", "parts edited", "moved by, of the norm", "int8 codes changed", "int4 codes changed")
    caption = "How far the weights moved, and the share of them that rounding would not undo: mean, range over parts"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


ENDS = ("lowest", "highest")


def _range(lowest: str, highest: str) -> str:
    return "" if MISSING in (lowest, highest) or lowest == highest else f"{lowest} to {highest}"


def compression(run: Run) -> Table:
    """Code lengths: kappa on model and null, a row a cell and place, forgotten facts beside kept ones."""
    null, frame = null_name(run), tables.compression_table(run)
    rows = []
    for key, group in frame.groupby(["cell", "site", "layer"], sort=False):
        cell, site, layer = tuple(key)  # pyright: ignore[reportArgumentType] - pandas has no complete types
        values: list[tuple[str, str]] = []
        for part in CODED:
            found = group.loc[group["part"] == part].to_dict("records")
            row: dict[Any, Any] = (
                found[0] if found else dict.fromkeys(("model", "null", "difference", "control"), float("nan"))
            )
            n = f"n={row['n']}, shuffled {digits(row['control'])}" if found else ""
            values += [(entry(row["model"])[0], n), entry(row["null"]), entry(row["difference"])]
        rows.append(((str(cell), ""), (f"{site}, layer {layer}", ""), *values))
    columns = [f"{part}: {what}" for part in CODED.values() for what in ("κ", f"κ, {null}", "difference")]
    caption = "How readable the answers are: κ, how many times shorter features make their code (1: not at all)"
    return Table(caption=caption, columns=("cell", "where", *columns), rows=tuple(rows))


CODED = {"forget_known": "forgotten, shown", "retain_train": "kept"}


def evaluation(run: Run) -> Table:
    """Everything the evaluation measured."""
    rows = []
    for row in tables.evaluation_table(run).to_dict("records"):
        words = [(str(row[key]) or MISSING, "") for key in ("cell", "part", "form", "metric")]
        rows.append((*words, spread(row, "mean", lower="lower", upper="upper", n=row["n"])))
    return Table(
        caption="Every measured mean with its 95% interval over facts",
        columns=("cell", "part", "form", "metric", "mean"),
        rows=tuple(rows),
    )


def agreement(run: Run) -> Table:
    """Localizers against each other."""
    return plain("Localizers compared, by the components both score", pd.DataFrame(run.agreement))
