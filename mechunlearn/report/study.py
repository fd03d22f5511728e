"""The pictures of the study: every arm of a preset beside the paper's, and what became of the paper's claims."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.report import theme
from mechunlearn.report.theme import error_bars, interval_words, styled
from mechunlearn.statistics import Interval
from mechunlearn.study.claims import CLAIMS, DOES_NOT, HOLDS, OPEN, beside_published
from mechunlearn.study.tables import StudyTables

# pandas has no complete types
# pyright: standard

SHOWN = (
    ("forget", "forget: P(true)"),
    ("edit", "edit: P(injected)"),
    ("multiple choice, edit", "multiple choice: P(injected)"),
    ("relearning, excess", "relearning: excess over twin"),
    ("probing, excess", "probing: excess over twin"),
    ("maintain", "maintain: P(true)"),
)
COLOURS = ((0, theme.BAD), (0.5, "#d5d8dd"), (1, theme.ORIGINAL))  # of `DOES_NOT`, `OPEN`, `HOLDS`


def arms_figure(tables: StudyTables, preset: str) -> go.Figure:
    """Every arm of one preset in a panel a measure, with 95% intervals; rings are the paper's numbers where it has any.

    Units: probabilities in [0, 1]; excess in [-1, 1]. Attacks at the quick level.
    """
    rows = tables.arms.loc[(tables.arms["preset"] == preset) & (tables.arms["level"] == "quick")]
    paper = beside_published(tables)
    paper = paper.loc[paper["preset"] == preset]
    arms = list(dict.fromkeys(rows["arm"]))[::-1]
    measures = [(m, title) for m, title in SHOWN if m in set(rows["measure"])]
    figure = make_subplots(
        1, len(measures), shared_yaxes=True, horizontal_spacing=0.015, subplot_titles=[title for _, title in measures]
    )
    in_paper = next((m for m, _ in measures if m in set(paper["measure"])), None)  # whose rings are in the legend
    for column, (measure, title) in enumerate(measures, 1):
        own = rows.loc[rows["measure"] == measure].to_dict("records")
        found = [Interval(value=r["mean"], lower=r["lower"], upper=r["upper"], n=r["n_facts"]) for r in own]
        figure.add_trace(
            go.Scatter(
                x=[f.value for f in found], y=[r["arm"] for r in own], mode="markers", name="here",
                marker={"color": theme.EDITED, "size": 9}, error_x=error_bars(*found), showlegend=column == 1,
                text=[interval_words(f) for f in found], hovertemplate="%{y}, " + title + ": %{text}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
        theirs = paper.loc[paper["measure"] == measure]
        figure.add_trace(
            go.Scatter(
                x=theirs["published"], y=theirs["arm"], mode="markers", name="the paper's (7 to 9 B models)",
                showlegend=measure == in_paper,
                marker={"color": theme.BAD, "size": 12, "symbol": "circle-open", "line": {"width": 2}},
                hovertemplate="%{y}, published: %{x:.3f}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
        low = -0.35 if measure.endswith("excess") else -0.05
        figure.update_xaxes(range=[low, 1.05], tickvals=[0, 0.5, 1], row=1, col=column)
    figure.update_yaxes(categoryorder="array", categoryarray=arms)
    figure.update_layout(legend={"orientation": "h", "y": -0.12})
    n = rows.loc[rows["measure"] == "forget", "n_facts"].max()
    seeds = rows["n_seeds"].max()
    subtitle = f"{n:.0f} forgotten facts, {seeds} seeds, 95% intervals over seeds and facts"
    return styled(figure, f"{preset}: every arm", subtitle, height=220 + 30 * len(arms))


SHORT = {DOES_NOT: "against", OPEN: "open", HOLDS: "for"}
"""Of one comparison; that a claim holds is said of all of them together."""


def claims_figure(claims: pd.DataFrame) -> go.Figure:
    """Claim by claim, against which arm and in which preset fact lookup keeps what the paper says of it."""
    quick = claims.loc[claims["level"] == "quick"]
    arms, presets = list(dict.fromkeys(quick["against"])), list(dict.fromkeys(quick["preset"]))
    words = (DOES_NOT, OPEN, HOLDS)
    figure = make_subplots(
        len(CLAIMS), 1, shared_xaxes=True, vertical_spacing=0.06,
        subplot_titles=[f"{claim.name}: {claim.says}" for claim in CLAIMS],
    )  # fmt: skip
    for row, claim in enumerate(CLAIMS, 1):
        own = {(r["preset"], r["against"]): r for r in quick.loc[quick["claim"] == claim.name].to_dict("records")}
        z = [[words.index(own[p, a]["word"]) if (p, a) in own else None for a in arms] for p in presets]
        text = [[own[p, a]["why"] if (p, a) in own else "" for a in arms] for p in presets]
        shown = [[SHORT[own[p, a]["word"]] if (p, a) in own else "" for a in arms] for p in presets]
        figure.add_trace(
            go.Heatmap(
                z=z, x=arms, y=presets, zmin=0, zmax=2, showscale=False, xgap=2, ygap=2, text=shown, hovertext=text,
                colorscale=COLOURS, texttemplate="%{text}",
                hovertemplate="%{y} against %{x}: %{hovertext}<extra></extra>", textfont={"size": 11},
            ),
            row=row, col=1,
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    subtitle = "fact lookup (probing) against each arm, quick attacks; a difference counts if Holm's p is below .05"
    return styled(
        figure, "What became of the paper's claims", subtitle, height=240 + 30 * len(CLAIMS) * (len(presets) + 2)
    )
