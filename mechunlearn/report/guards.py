"""The picture of `bench guards`: what guards forget and spare, when their gates open, and what gets around them."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled

# pandas has no complete types
# pyright: standard

COLOURS = {
    "static": theme.EDITED, "dsg": theme.BAD, "share": theme.ORIGINAL, "window": theme.OTHER, "cusum": theme.TWIN,
    "random": theme.QUIET, "removed": theme.LIGHT,
}  # fmt: skip
FORGET, NEAR = "P(true), to forget", "P(true), near"
PANELS: dict[str, tuple[str, str, str, str | None, str]] = {
    # experiment: title, x title, y title, measure along x (None: x itself), measure along y
    "clamp_strength": ("Clamp strength: to forget against near", NEAR, FORGET, "near", "forget"),
    "gate_threshold": ("Gate: where it opens", "opens on near", "opens on text to forget", "opens on near",
                       "opens on forget"),
    "dilution": ("Filler before the prompt", "tokens", FORGET, None, "forget"),
    "number_of_features": ("Number of features: to forget against near", NEAR, FORGET, "near", "forget"),
    "sequential": ("Requests one after another", "guards", NEAR, None, "near"),
    "data_share": ("Share of the data", "share", FORGET, None, "forget"),
}  # fmt: skip


def guards_figure(summary: pd.DataFrame) -> go.Figure:
    """Six panels, means over seeds; error bars (95%) along y. Panels of experiments that were not run stay empty."""
    figure = make_subplots(2, 3, subplot_titles=[panel[0] for panel in PANELS.values()], vertical_spacing=0.2,
                           horizontal_spacing=0.08)  # fmt: skip
    told: set[str] = set()
    for place, (experiment, (_, x_title, y_title, along, up)) in enumerate(PANELS.items()):
        row, col = place // 3 + 1, place % 3 + 1
        rows = summary.loc[summary["experiment"] == experiment]
        for arm, colour in COLOURS.items():
            own = rows.loc[rows["arm"] == arm]
            y = own.loc[own["measure"] == up].set_index("x")
            if not len(y):
                continue
            means = own.pivot_table(index="x", columns="measure", values="value")
            xs = y.index if along is None else means.loc[y.index, along]
            figure.add_trace(
                go.Scatter(
                    x=list(xs), y=list(y["value"]), name=label(arm), legendgroup=arm, showlegend=arm not in told,
                    mode="lines+markers", line={"color": colour, "width": 1.5},
                    marker={"size": 8, "symbol": theme.SYMBOLS[list(COLOURS).index(arm)]},
                    error_y={"type": "data", "symmetric": False, "thickness": 1, "width": 2,
                             "array": list((y["upper"] - y["value"]).fillna(0)),
                             "arrayminus": list((y["value"] - y["lower"]).fillna(0))},
                    text=[f"x = {x:g}" for x in y.index],
                    hovertemplate=f"{label(arm)}, %{{text}}: %{{x:.3f}}, %{{y:.3f}}<extra></extra>",
                ),
                row=row, col=col,
            )  # fmt: skip
            told.add(arm)
        figure.update_xaxes(title_text=x_title, row=row, col=col)
        figure.update_yaxes(title_text=y_title, range=[-0.03, 1.05], row=row, col=col)
        if along is not None:
            figure.update_xaxes(range=[-0.03, 1.05], row=row, col=col)
    figure.update_layout(legend={"orientation": "h", "y": -0.12})
    seeds = max(summary["n_seeds"])
    subtitle = (
        "P(true | candidates); good is low on what is to be forgotten and high near to it. "
        f"Means over {seeds} deals, 95% intervals"
    )
    return styled(figure, "Guards of activations", subtitle, height=820)
