"""The picture of `organism check`: what can be read where, what the answer needs, and when it is fetched."""

from itertools import cycle

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.bench.check import FEW, INTERVENTIONS, Check
from mechunlearn.bench.criteria import FAILS, HOLDS, MISSED, NOT_MEASURED, summary
from mechunlearn.bench.mechanism import Mechanism
from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled

PANELS = (
    "(a) a probe reads the attribute at the subject's last token",
    "(b) accuracy when MLPs write what another subject's would",
    "(c) the band's output of subject B gives B's answer",
    "(d) accuracy when the last token cannot attend to the subject",
)


def check_figure(check: Check) -> go.Figure:
    """Four panels, one for each claim about the mechanism; see `bench.check` for the criteria.

    Units: shares of facts; in (a) above the best baseline. Dotted lines are what the criteria need.
    """
    figure = make_subplots(2, 2, subplot_titles=PANELS, horizontal_spacing=0.1, vertical_spacing=0.2)
    colours = dict(zip(dict.fromkeys(check.criteria["dataset"]), cycle(theme.PALETTE), strict=False))
    _probe_curves(figure, check, colours)
    for dataset, mechanism in check.mechanisms.items():
        _mechanism(figure, dataset, mechanism, colours[dataset])
    figure.add_hline(y=0.6, line={"dash": "dot", "color": theme.QUIET}, row=2, col=1)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_yaxes(title="accuracy above the best baseline", row=1, col=1)
    figure.update_yaxes(title="accuracy", col=2)
    figure.update_yaxes(title="B's answer", row=2, col=1)
    figure.update_xaxes(title="layer of the residual stream (0: embeddings)", row=1, col=1)
    figure.update_xaxes(title="layer; solid: blocked from it on, dotted: blocked up to it", row=2, col=2)
    title = f"Does {label(check.name)} look facts up at the subject?"
    return styled(figure, title, summary(check.criteria), height=900)


def _mechanism(figure: go.Figure, dataset: str, mechanism: Mechanism, colour: str) -> None:
    """Panels (b) to (d) of one data set."""
    ablations, band = mechanism.ablations, mechanism.band
    shares = ablations.groupby("intervention").agg({"correct": "mean"}).reindex(INTERVENTIONS).dropna()
    figure.add_bar(
        x=list(shares.index), y=shares["correct"], name=f"{label(dataset)} (band m{band.first} to m{band.last})",
        legendgroup=dataset, marker={"color": colour}, row=1, col=2,
    )  # fmt: skip
    donors = ablations.loc[(ablations["intervention"] == "band") & ablations["has_donor"]]
    donors = donors.groupby("relation").agg({"donor": "mean"})
    figure.add_bar(
        x=[label(str(name).replace("_", " ")) for name in donors.index], y=donors["donor"], legendgroup=dataset,
        showlegend=False, marker={"color": colour}, row=2, col=1,
    )  # fmt: skip
    accuracy = mechanism.knockouts.groupby(["first", "last"], as_index=False).agg({"correct": "mean"})
    end = accuracy["last"].max()
    for dash, name, rows, at in (
        ("solid", "blocked from this layer on", accuracy.query(f"last == {end}"), "first"),
        ("dot", "blocked up to this layer", accuracy.query("first == 0 and last >= 0"), "last"),
    ):
        figure.add_scatter(
            x=rows[at], y=rows["correct"], mode="lines+markers", legendgroup=dataset, showlegend=False,
            line={"dash": dash, "color": colour}, name=f"{label(dataset)}, {name}", row=2, col=2,
        )  # fmt: skip


def _probe_curves(figure: go.Figure, check: Check, colours: dict[str, str]) -> None:
    rows = check.readable.query("part == 'all'")
    if rows.empty:
        return
    depth = int(rows["layer"].to_numpy().max())
    pairs = rows.loc[:, ["dataset", "relation"]].drop_duplicates()
    for dataset, relation in pairs.itertuples(index=False):
        curve = rows.loc[(rows["dataset"] == dataset) & (rows["relation"] == relation)]
        answers = int(curve["answers"].iloc[0])
        figure.add_scatter(
            x=curve["layer"], y=curve["accuracy"] - curve["baseline"], mode="lines", legendgroup=dataset,
            showlegend=False, name=f"{label(dataset)}: {label(relation)}, {answers} answers",
            line={"color": colours[str(dataset)], "dash": "solid" if answers <= FEW else "dot", "width": 2},
            row=1, col=1,
        )  # fmt: skip
    figure.add_hline(y=0.5, line={"dash": "dot", "color": theme.QUIET}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    figure.add_vline(x=2 * depth / 3, line={"dash": "dot", "color": theme.QUIET}, row=1, col=1)  # pyright: ignore[reportArgumentType]


def sweep_figure(rows: pd.DataFrame) -> go.Figure:
    """Every recipe of `organisms.sweep` against every criterion: the measured share, coloured by outcome."""
    colours = {FAILS: theme.BAD, MISSED: theme.OTHER, HOLDS: theme.ORIGINAL}
    steps = [(i + end) / len(colours) for i in range(len(colours)) for end in (0, 1)]
    scale = list(zip(steps, [colour for colour in colours.values() for _ in range(2)], strict=True))
    panels = list(dict.fromkeys(rows["dataset"]))
    figure = make_subplots(1, len(panels), subplot_titles=panels, shared_yaxes=True, horizontal_spacing=0.03)
    order = list(dict.fromkeys(rows["recipe"]))[::-1]
    for column, dataset in enumerate(panels, start=1):
        part = rows.loc[(rows["dataset"] == dataset) & (rows["outcome"] != NOT_MEASURED)]
        criteria = list(dict.fromkeys(part["criterion"]))
        cells = part.assign(
            colour=part["outcome"].map({name: i + 0.5 for i, name in enumerate(colours)}),
            text=[f"{value:.2f}" for value in part["measured"]],
        ).set_index(["recipe", "criterion"])
        table, text = (cells[name].unstack().reindex(index=order, columns=criteria) for name in ("colour", "text"))
        figure.add_heatmap(
            z=table.to_numpy(float), x=criteria, y=order, text=text.fillna(""), texttemplate="%{text}",
            zmin=0, zmax=len(colours), colorscale=scale, showscale=False, opacity=0.75, xgap=2, ygap=2,
            row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(tickangle=-35)
    told = "measured shares; red: the criterion fails; empty: not measured, too little is known"
    return styled(figure, "What each ingredient of the recipe is worth", told, height=820)


def training_figure(curve: pd.DataFrame) -> go.Figure:
    """Loss in nats per token against tokens read; columns tokens, loss."""
    figure = go.Figure(go.Scatter(x=curve["tokens"], y=curve["loss"], mode="lines", line={"color": theme.EDITED}))
    figure.update_xaxes(title="tokens read")
    figure.update_yaxes(title="loss (nats per token)", type="log")
    return styled(figure, "Training", "mean over the steps since the point before")
