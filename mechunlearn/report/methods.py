"""One table and one picture of several runs: what each way of making a model forget buys, on the same facts."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechunlearn.report import theme
from mechunlearn.report.numbers import MISSING, hidden_interval, measured, share_interval, strongest
from mechunlearn.report.theme import error_bars, interval_words, label, styled
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval

# pandas has no complete types
# pyright: standard


def methods_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a cell of every run, controls included; numbers over facts are `Interval`s.

    forgotten, retained: mean P(true | candidates) of hidden facts to forget, over all seeds, and of facts to retain,
    under the first, by prompt, just asked. perplexity: on the evaluation's text (see `evaluate`); its ratio is to the
    run's own original. D: share of the knowledge that the strongest attack brings back, through what guards the model
    if anything does. seconds: to make the edit, which is what one more request costs. with the weights: mean P(true)
    of the hidden facts that somebody who has the weights gets at least: of a guard that comes off, by taking it off;
    of anything else, after the strongest attack.

    Raises:
        ValueError: runs about different facts.
    """
    if any(_asked(run) != _asked(runs[0]) for run in runs):
        names = ", ".join(str(run.manifest["name"]) for run in runs)
        raise ValueError(f"compare: the runs {names} forget different facts; give runs with the same [facts] and seed")
    return pd.DataFrame([_row(run, cell) for run in runs for cell in run.cells])


def _asked(run: Run) -> tuple[Any, Any]:
    """What the run was told to forget; of that each model forgets what it knows."""
    settings = run.manifest["settings"]
    return settings["facts"], settings["seed"]


def _row(run: Run, cell: Cell) -> dict[str, Any]:
    row = strongest(cell.verdict)
    before = hidden_interval(cell.edited, row.name, before=True) if row else measured(cell, "forget_hidden", "p_true")
    after = hidden_interval(cell.edited, row.name) if row else None
    if cell.notes.get("comes_off"):
        after = measured(run.cell("original"), "forget_hidden", "p_true")
    return {
        "run": run.manifest["name"], "model": run.manifest["model"]["name"], "cell": cell.name,
        "verdict": str(cell.verdict), "forgotten": before, "retained": measured(cell, "retain_test", "p_true"),
        "perplexity": measured(cell, "text", "perplexity", "text"),
        "perplexity ratio": measured(cell, "text", "perplexity_ratio", "text"),
        "strongest attack": row.name if row else MISSING, "D": share_interval(row) if row else None,
        "seconds": cell.notes.get("made_seconds"), "with the weights": after,
    }  # fmt: skip


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with plain columns: of an interval its value, lower and upper bound, and n."""
    columns: dict[str, list[Any]] = {}
    for name in table.columns:
        if not any(isinstance(value, Interval) for value in table[name]):
            columns[name] = list(table[name])
            continue
        for key in ("value", "lower", "upper", "n"):
            columns[name if key == "value" else f"{name} {key}"] = [getattr(value, key, None) for value in table[name]]
    return pd.DataFrame(columns)


def methods_figure(table: pd.DataFrame) -> go.Figure:
    """Of every edit: what it leaves when asked, what attacks bring back, and what who has the weights gets.

    P(true | candidates) on the hidden facts; below each name the verdict.
    """
    arms = table.loc[table["seconds"].notna()]
    names = [f"{label(cell)}<br><i>{label(word)}</i>" for cell, word in zip(arms["cell"], arms["verdict"], strict=True)]
    figure = go.Figure()
    for number, (column, shown, colour) in enumerate((
        ("retained", "retained, just asked", theme.ORIGINAL), ("forgotten", "to forget, just asked", theme.EDITED),
        ("with the weights", "to forget, by who has the weights", theme.BAD),
    )):  # fmt: skip
        found = [value if isinstance(value, Interval) else None for value in arms[column]]
        at = [(name, value) for name, value in zip(names, found, strict=True) if value is not None]
        figure.add_trace(
            go.Scatter(
                x=[value.value for _, value in at], y=[name for name, _ in at], mode="markers", name=shown,
                marker={"color": colour, "size": 11, "symbol": theme.SYMBOLS[number]},
                error_x=error_bars(*(value for _, value in at)), text=[interval_words(value) for _, value in at],
                hovertemplate="%{y}<br>" + shown + ": %{text}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(range=[-0.03, 1.05], title_text="P(true | candidates)")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    return styled(figure, "What each way of forgetting buys", "95% intervals over facts", height=190 + 52 * len(names))
