"""The picture of `organism check`: what can be read where, what the answer needs, and when it is fetched."""

from itertools import cycle

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.bench.check import FEW, Check
from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled

INTERVENTIONS = ("band", "earlier", "later", "band at the last token")
PANELS = (
    "(a) a probe reads the attribute at the subject's last token",
    "(b) accuracy when MLPs write what another subject's would",
    "(c) the band's output of subject B gives B's answer",
    "(d) accuracy when the last token cannot attend to the subject",
)


def check_figure(check: Check) -> go.Figure:
    """Four panels, one for each claim about the mechanism; see `bench.check` for the criteria.

    Units: shares of facts. Dotted lines are what the criteria need (in (a) and (b) relative to the best baseline and
    to the intact model).
    """
    figure = make_subplots(2, 2, subplot_titles=PANELS, horizontal_spacing=0.1, vertical_spacing=0.2)
    colours = dict(zip(dict.fromkeys(check.criteria["dataset"]), cycle(theme.PALETTE), strict=False))
    _probe_curves(figure, check, colours)
    for dataset, mechanism in check.mechanisms.items():
        colour = {"color": colours[dataset]}
        ablations, cut = mechanism.ablations, mechanism.knockouts
        shares = ablations.groupby("intervention")["correct"].mean()
        names = [name for name in INTERVENTIONS if name in shares.index]
        band = f"band m{mechanism.band.first} to m{mechanism.band.last}"
        figure.add_bar(
            x=names,
            y=shares[names],
            name=f"{label(dataset)} ({band})",
            legendgroup=dataset,
            marker=colour,
            row=1,
            col=2,
        )
        donors = ablations[ablations["intervention"] == "band"].groupby("relation")["donor"].mean()
        figure.add_bar(
            x=[label(name.replace("_", " ")) for name in donors.index], y=donors, legendgroup=dataset, showlegend=False,
            marker=colour, row=2, col=1,
        )  # fmt: skip
        accuracy = cut.groupby(["first", "last"], as_index=False)["correct"].mean()
        end = accuracy["last"].max()
        for dash, name, rows, at in (
            ("solid", "blocked from this layer on", accuracy[accuracy["last"] == end], "first"),
            ("dot", "blocked up to this layer", accuracy[(accuracy["first"] == 0) & (accuracy["last"] >= 0)], "last"),
        ):
            figure.add_scatter(
                x=rows[at], y=rows["correct"], mode="lines+markers", legendgroup=dataset, showlegend=False,
                line={"dash": dash, **colour}, name=f"{label(dataset)}, {name}", row=2, col=2,
            )  # fmt: skip
    figure.add_hline(y=0.6, line={"dash": "dot", "color": theme.QUIET}, row=2, col=1)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_yaxes(title="accuracy above the best baseline", row=1, col=1)
    figure.update_yaxes(title="accuracy", col=2)
    figure.update_yaxes(title="B's answer", row=2, col=1)
    figure.update_xaxes(title="layer of the residual stream (0: embeddings)", row=1, col=1)
    figure.update_xaxes(title="layer; solid: blocked from it on, dotted: blocked up to it", row=2, col=2)
    failed = check.criteria[~check.criteria["holds"].astype(bool)]
    subtitle = "every criterion holds" if failed.empty else f"{len(failed)} of {len(check.criteria)} criteria fail"
    return styled(figure, f"Does {label(check.name)} look facts up at the subject?", subtitle, height=900)


def _probe_curves(figure: go.Figure, check: Check, colours: dict[str, str]) -> None:
    if check.readable.empty:
        return
    rows = check.readable[check.readable["part"] == "all"]
    depth = int(rows["layer"].max())
    for (dataset, relation), curve in rows.groupby(["dataset", "relation"], sort=False):
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
    """Every recipe of `organisms.sweep` against every criterion: the measured share; green holds, red does not."""
    panels = list(dict.fromkeys(rows["dataset"]))
    figure = make_subplots(1, len(panels), subplot_titles=panels, shared_yaxes=True, horizontal_spacing=0.03)
    for column, dataset in enumerate(panels, start=1):
        part = rows[rows["dataset"] == dataset]
        measured = part.pivot(index="recipe", columns="criterion", values="measured")
        order = [r for r in dict.fromkeys(rows["recipe"]) if r in measured.index][::-1]
        criteria = [c for c in dict.fromkeys(rows["criterion"]) if c in measured.columns]
        holds = part.pivot(index="recipe", columns="criterion", values="holds")
        table, verdict = measured.loc[order, criteria], holds.loc[order, criteria]
        figure.add_heatmap(
            z=verdict.map(lambda x: float("nan") if pd.isna(x) else float(bool(x))).to_numpy(float),
            x=criteria, y=order, text=table.map(lambda x: "" if pd.isna(x) else f"{x:.2f}"), texttemplate="%{text}",
            zmin=0, zmax=1, colorscale=[[0, theme.BAD], [1, theme.ORIGINAL]], showscale=False,
            opacity=0.75, xgap=2, ygap=2,
            row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(tickangle=-35)
    return styled(
        figure, "What each ingredient of the recipe is worth", "measured shares; red: the criterion fails", height=820
    )


def training_figure(curve: pd.DataFrame) -> go.Figure:
    """Loss in nats per token against tokens read; columns tokens, loss."""
    figure = go.Figure(go.Scatter(x=curve["tokens"], y=curve["loss"], mode="lines", line={"color": theme.EDITED}))
    figure.update_xaxes(title="tokens read")
    figure.update_yaxes(title="loss (nats per token)", type="log")
    return styled(figure, "Training", "mean over the steps since the point before")
