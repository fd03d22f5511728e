"""What a run came to: shares brought back, weights changed, damage done.

Every function takes data and returns a plotly Figure in one theme.
"""

from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.components import Component
from mechunlearn.report import theme
from mechunlearn.report.numbers import measured
from mechunlearn.report.theme import error_bars, interval_words, label, styled
from mechunlearn.runs import Cell, Run


def shares(run: Run) -> go.Figure:
    """Forest plot of D, the share of the lost knowledge that each attack brings back, with its bounds.

    0 is a model that never knew, 1 the original; the dashed line is delta, the most that still counts as removed. Lower
    bounds hold for all attacks at once, upper ones for each. Open marks do not count: no power shown, or failed health.

    Raises:
        ValueError: no cell was attacked.
    """
    cells = [cell for cell in run.cells if cell.verdict.rows]
    if not cells:
        raise ValueError("shares: no cell has attacks to show; run at least one attack")
    attacks = list(dict.fromkeys(row.name for cell in cells for row in cell.verdict.rows))
    figure = go.Figure()
    for i, attack in enumerate(attacks):
        found = [(j, row) for j, cell in enumerate(cells) for row in cell.verdict.rows if row.name == attack]
        counts = [row.counts for _, row in found]
        symbol, colour = theme.SYMBOLS[i % len(theme.SYMBOLS)], theme.PALETTE[i % len(theme.PALETTE)]
        figure.add_trace(
            go.Scatter(
                x=[row.share for _, row in found],
                y=[j + 0.6 * ((i + 0.5) / len(attacks) - 0.5) for j, _ in found],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "thickness": 2.5,
                    "width": 5,
                    "array": [max(row.upper - row.share, 0.0) for _, row in found],
                    "arrayminus": [max(row.share - row.lower, 0.0) for _, row in found],
                },
                mode="markers",
                name=label(attack),
                marker={
                    "size": 12,
                    "color": colour,
                    "symbol": [symbol if c else f"{symbol}-open" for c in counts],
                    "line": {"width": 2, "color": colour},
                },
                hovertext=[
                    f"<b>{label(cells[j].name)}</b>, {label(attack)}"
                    f"<br>D {row.share:.2f} [{row.lower:.2f}, {row.upper:.2f}]"
                    f"<br>n = {row.n_facts} facts, {row.n_seeds} seeds<br>{label(row.note)}"
                    for j, row in found
                ],
                hoverinfo="text",
            )
        )
    delta = cells[0].verdict.delta
    for x, text, dash in (
        (0.0, "never knew", "solid"),
        (delta, f"δ = {delta:.0%}", "dash"),
        (1.0, "original", "solid"),
    ):
        figure.add_vline(x=x, line={"color": theme.BAD if dash == "dash" else theme.QUIET, "dash": dash, "width": 2})
        place = (
            {"xanchor": "left", "x": x + 0.01, "font": {"color": theme.BAD}}
            if dash == "dash"
            else {"x": x, "xanchor": "right"}
        )
        figure.add_annotation(**place, y=1, yref="paper", yanchor="bottom", text=text, showarrow=False)
    bounds = [bound for cell in cells for row in cell.verdict.rows for bound in (row.lower, row.upper, row.share)]
    span = [max(min(*bounds, -0.15) - 0.05, -1.0), min(max(*bounds, 1.05) + 0.05, 2.0)]
    figure.update_xaxes(range=span, tickformat=".0%", title="recovered share D", zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(cells))),
        ticktext=[f"{label(c.name)}<br><i>{label(c.verdict)}</i>" for c in cells],
        range=[len(cells) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
    )
    subtitle = "0%: never knew, 100%: the original; open marks do not count"
    return styled(figure, "What the attacks bring back", subtitle, height=190 + 66 * len(cells))


def weight_changes(run: Run | Cell) -> go.Figure:
    """Heat map of how much each edited component changed: ||W' - W|| / ||W||, one row a cell.

    Raises:
        ValueError: nothing was edited.
    """
    cells = (run,) if isinstance(run, Cell) else run.cells
    frames = {
        cell.name: cell.weight_changes for cell in cells if cell.weight_changes is not None and len(cell.weight_changes)
    }
    if not frames:
        raise ValueError("weight_changes: no cell has a weight edit; run an arm")
    table = pd.DataFrame({name: frame.set_index("component")["relative_change"] for name, frame in frames.items()})
    parsed = sorted(
        (Component.parse(str(text)) for text in table.index),
        key=lambda c: (c.kind != "mlp", c.kind, c.layer, c.index or 0),
    )
    names, values = [str(c) for c in parsed], table.loc[[str(c) for c in parsed]].to_numpy().T
    hover = [[_change_words(label(cell), part, frames[cell]) for part in names] for cell in frames]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            y=[label(name) for name in frames],
            colorscale=theme.SEQUENTIAL,
            zmin=0,
            zmax=float(np.nanmax(values)) or 1.0,
            xgap=2,
            ygap=2,
            texttemplate="%{z:.2f}" if len(names) <= 16 else None,
            hoverongaps=False,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            colorbar={"tickformat": ".2f"},
        )
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return styled(
        figure,
        "How far the weights moved",
        "norm of the change over the norm before, of each edited part",
        height=170 + 44 * len(frames),
    )


def _change_words(cell: str, part: str, changes: pd.DataFrame) -> str:
    """What an edit did to one part; empty if it left the part alone."""
    found = changes.loc[changes["component"] == part].to_dict("records")
    if not found:
        return ""
    words = f"{cell}<br><b>{part}</b> changed by {found[0]['relative_change']:.3f} of its norm"
    for bits in (8, 4):
        if np.isfinite(share := found[0].get(f"flips_int{bits}", np.nan)):
            words += f"<br>{share:.1%} of its int{bits} codes"
    return words


def damage(run: Run) -> go.Figure:
    """What was kept against what was forgotten, when just asked: accuracy with exact 95% bounds, one mark a cell.

    Top left is what one wants: forgotten facts gone, others as they were.

    Raises:
        ValueError: no cell was evaluated on forgotten and retained facts.
    """
    panels = {"retain_test": "facts about others", "same_subject": "other facts, same subjects"}
    measures = {
        (cell.name, part): measured(cell, part, "accuracy") for cell in run.cells for part in ("forget_hidden", *panels)
    }
    parts = [part for part in panels if any(measures[cell.name, part] for cell in run.cells)]
    if not parts or not any(measures[cell.name, "forget_hidden"] for cell in run.cells):
        raise ValueError("damage: no cell has accuracy on forget_hidden and on kept facts; evaluate these parts")
    figure = make_subplots(
        1, len(parts), subplot_titles=[panels[part] for part in parts], shared_yaxes=True, horizontal_spacing=0.05
    )
    styles = zip(theme.PALETTE * len(run.cells), cycle(theme.SYMBOLS), strict=False)
    for cell, (colour, symbol) in zip(run.cells, styles, strict=False):
        forgotten = measures[cell.name, "forget_hidden"]
        for column, part in enumerate(parts, start=1):
            kept = measures[cell.name, part]
            if forgotten is None or kept is None:
                continue
            figure.add_trace(
                go.Scatter(
                    x=[forgotten.value],
                    y=[kept.value],
                    mode="markers",
                    name=label(cell.name),
                    legendgroup=cell.name,
                    showlegend=column == 1,
                    error_x=error_bars(forgotten),
                    error_y=error_bars(kept),
                    marker={"size": 14, "color": colour, "symbol": symbol, "line": {"color": "white", "width": 1}},
                    hovertext=f"<b>{label(cell.name)}</b><br>forgotten: {interval_words(forgotten)}<br>"
                    f"kept: {interval_words(kept)}",
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(range=[-0.05, 1.05], title="accuracy, forgotten facts")
    figure.update_yaxes(range=[-0.05, 1.05])
    figure.update_yaxes(title="accuracy, kept facts", row=1, col=1)
    return styled(figure, "What was kept, what was forgotten", "when just asked; top left is best", height=460)
