"""The picture of `bench planted`: how often each localizer is right, and at which planted layers."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.bench.planted import DEVELOPMENT, KEPT_OUT, PlantedBench
from mechunlearn.report import theme
from mechunlearn.report.theme import error_bars, interval_words, label, styled
from mechunlearn.statistics import Interval

# pandas has no complete types
# pyright: standard

COLOURS = {DEVELOPMENT: theme.QUIET, KEPT_OUT: theme.EDITED}


def planted_figure(bench: PlantedBench, metric: str = "hit@1") -> go.Figure:
    """Two panels: the metric by localizer, with intervals, on both parts; and by the (lowest) planted layer.

    Units: mean over plants in [0, 1]; intervals at 95% over bases. Localizers are sorted by the part kept out;
    one that does not score all its plants says of how many it is the mean.
    """
    summary = bench.summary
    rows = summary.loc[(summary["group"] == "all") & (summary["metric"] == metric)]
    part = KEPT_OUT if KEPT_OUT in set(rows["part"]) else DEVELOPMENT
    leading = rows.loc[rows["part"] == part].sort_values("value")
    names, scored = list(leading["localizer"]), list(leading["n_plants"])
    shown = {
        name: label(name) if n == max(scored) else f"{label(name)} ({n} of {max(scored)} plants)"
        for name, n in zip(names, scored, strict=True)
    }
    figure = make_subplots(
        1, 2, column_widths=[0.55, 0.45], horizontal_spacing=0.04, shared_yaxes=True,
        subplot_titles=(f"{label(metric)}, 95% intervals over bases", f"{label(metric)} by planted layer, all bases"),
    )  # fmt: skip
    for part, colour in COLOURS.items():
        own = rows.loc[(rows["part"] == part) & rows["localizer"].isin(names)].to_dict("records")
        intervals = [
            Interval(value=row["value"], lower=row["lower"], upper=row["upper"], n=row["n_bases"]) for row in own
        ]
        figure.add_trace(
            go.Scatter(
                x=[found.value for found in intervals], y=[shown[row["localizer"]] for row in own], mode="markers",
                name=part, marker={"color": colour, "size": 11, "symbol": theme.SYMBOLS[list(COLOURS).index(part)]},
                error_x=error_bars(*intervals),
                text=[interval_words(found) + " bases" for found in intervals],
                hovertemplate="%{y}, " + part + ": %{text}<extra></extra>",
            ),
            row=1, col=1,
        )  # fmt: skip
    _by_layer(figure, bench.rows, shown, metric)
    figure.update_xaxes(range=[-0.03, 1.05], tickformat=".0%", row=1, col=1)
    figure.update_yaxes(categoryorder="array", categoryarray=list(shown.values()), row=1, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.14})
    good = list(bench.ladder["reason"]).count("")
    subtitle = f"{good} of {len(bench.ladder)} plants verified, in {bench.rows['base'].nunique()} bases"
    return styled(figure, "Which localizer finds facts whose place is known", subtitle, height=200 + 34 * len(names))


def _by_layer(figure: go.Figure, rows: pd.DataFrame, shown: dict[str, str], metric: str) -> None:
    layers = sorted(set(rows["layer"]))
    means = rows.pivot_table(index="localizer", columns="layer", values=metric).reindex(
        index=list(shown), columns=layers
    )
    figure.add_trace(
        go.Heatmap(
            z=means.to_numpy(), x=[f"layer {layer}" for layer in layers], y=list(shown.values()),
            zmin=0, zmax=1, colorscale=theme.SEQUENTIAL, showscale=False, xgap=2, ygap=2, texttemplate="%{z:.0%}",
            hovertemplate="%{y}, planted at %{x}: %{z:.0%}<extra></extra>",
        ),
        row=1, col=2,
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, row=1, col=2)
