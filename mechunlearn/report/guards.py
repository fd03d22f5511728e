"""The pictures of `bench guards` and `bench codes`: what is forgotten and spared, when gates open, what gets around."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled

# pandas has no complete types
# pyright: standard

COLOURS = {
    "static": theme.EDITED, "dsg": theme.BAD, "share": theme.ORIGINAL, "window": theme.OTHER, "cusum": theme.TWIN,
    "random": theme.QUIET, "removed": theme.LIGHT, "deleted": theme.EDITED, "nothing deleted": theme.ORIGINAL,
    "no codebook": theme.LIGHT, "never knew": theme.TWIN,
}  # fmt: skip
FORGET, NEAR = "P(true), to forget", "P(true), near"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One experiment as lines, an arm each."""

    title: str
    x_title: str
    y_title: str
    up: str
    """The measure along y."""
    along: str | None = None
    """The measure along x; None: the experiment's own variable."""


GUARDS: Mapping[str, Panel] = {
    "clamp_strength": Panel(title="Clamp strength", x_title=NEAR, y_title=FORGET, along="near", up="forget"),
    "number_of_features": Panel(title="Number of features", x_title=NEAR, y_title=FORGET, along="near", up="forget"),
    "gate_threshold": Panel(
        title="Gate", x_title="opens on near", y_title="opens on text to forget", along="opens on near",
        up="opens on forget",
    ),
    "dilution": Panel(title="Filler before the prompt", x_title="tokens", y_title=FORGET, up="forget"),
    "sequential": Panel(title="Requests one after another", x_title="guards", y_title=NEAR, up="near"),
    "data_share": Panel(title="Share of the data", x_title="share", y_title=FORGET, up="forget"),
}  # fmt: skip
CODES: Mapping[str, Panel] = {
    "deletion": Panel(title="Rounds of deletion", x_title=NEAR, y_title=FORGET, along="near", up="forget"),
    "wider_choice": Panel(title="Closest codes counted", x_title=NEAR, y_title=FORGET, along="near", up="forget"),
    "more_requests": Panel(title="Requests one after another", x_title="deletions", y_title=NEAR, up="near"),
}


def guards_figure(summary: pd.DataFrame) -> go.Figure:
    """A panel for each of six experiments that was run, means over seeds; error bars (95%) along y."""
    return _lines(summary, GUARDS, "Guards of activations")


def codes_figure(summary: pd.DataFrame) -> go.Figure:
    """Of three experiments, as in `guards_figure`."""
    return _lines(summary, CODES, "Code deletion")


def _lines(summary: pd.DataFrame, panels: Mapping[str, Panel], title: str) -> go.Figure:
    run = set(summary["experiment"])
    panels = {name: panel for name, panel in panels.items() if name in run}
    n_rows, n_cols = max(1, -(-len(panels) // 3)), min(3, max(1, len(panels)))
    figure = make_subplots(
        n_rows, n_cols, subplot_titles=[panel.title for panel in panels.values()], horizontal_spacing=0.07,
        vertical_spacing=0.17,
    )  # fmt: skip
    told: set[str] = set()
    for place, (experiment, panel) in enumerate(panels.items()):
        row, col = place // 3 + 1, place % 3 + 1
        rows = summary.loc[summary["experiment"] == experiment]
        for number, (arm, colour) in enumerate(COLOURS.items()):
            own = rows.loc[rows["arm"] == arm]
            y = own.loc[own["measure"] == panel.up].set_index("x")
            if not len(y):
                continue
            means = own.pivot_table(index="x", columns="measure", values="value")
            xs = y.index if panel.along is None else means.loc[y.index, panel.along]
            figure.add_trace(
                go.Scatter(
                    x=list(xs), y=list(y["value"]), name=label(arm), legendgroup=arm, showlegend=arm not in told,
                    mode="lines+markers", line={"color": colour, "width": 1.5},
                    marker={"size": 8, "symbol": theme.SYMBOLS[number % len(theme.SYMBOLS)]},
                    error_y={"type": "data", "symmetric": False, "thickness": 1, "width": 2,
                             "array": list((y["upper"] - y["value"]).fillna(0)),
                             "arrayminus": list((y["value"] - y["lower"]).fillna(0))},
                    text=[f"x = {x:g}" for x in y.index],
                    hovertemplate=f"{label(arm)}, %{{text}}: %{{x:.3f}}, %{{y:.3f}}<extra></extra>",
                ),
                row=row, col=col,
            )  # fmt: skip
            told.add(arm)
        figure.update_xaxes(title_text=panel.x_title, row=row, col=col)
        figure.update_yaxes(title_text=panel.y_title, range=[-0.03, 1.05], row=row, col=col)
        if panel.along is not None:
            figure.update_xaxes(range=[-0.03, 1.05], row=row, col=col)
    figure.update_layout(legend={"orientation": "h", "y": -0.12})
    n_seeds = max(summary["n_seeds"])
    over = f"Means over {n_seeds} deals of the facts, 95% intervals" if n_seeds > 1 else "One deal of the facts"
    subtitle = f"P(true | candidates): good is low on what is to be forgotten and high near to it. {over}"
    return styled(figure, title, subtitle, height=130 + 350 * n_rows)
