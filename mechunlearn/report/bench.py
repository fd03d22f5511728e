"""The pictures of `bench verdict`: what was said of each model of known truth, and which attacks recover what."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.bench.verdict import VerdictBench
from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled

# pandas has no complete types
# pyright: standard

COLOURS = {"hidden": theme.EDITED, "removed": theme.ORIGINAL, "inconclusive": theme.QUIET, "invalid": theme.BAD}


def bench_figure(bench: VerdictBench) -> go.Figure:
    """Three panels: words by case, share of decided words by number of hidden facts, and D by suppression and attack.

    Units: verdicts counted over seeds; shares of verdicts; D as in `verdict.decide`, mean over seeds.
    """
    rows = bench.at()
    figure = make_subplots(
        1, 3, column_widths=[0.42, 0.2, 0.38], horizontal_spacing=0.12,
        subplot_titles=("what was said of each model", "with fewer hidden facts", "D: what each attack brings back"),
    )  # fmt: skip
    _words(figure, rows)
    _by_facts(figure, bench.verdicts)
    _power(figure, bench.power)
    goals = {row["what"]: row for row in bench.goals().to_dict("records")}
    right, wrong = goals["decided verdicts right"], goals["confidently wrong"]
    subtitle = (
        f"{right['count']} of {right['of']} decided verdicts right, {wrong['count']} wrong; "
        f"{goals['inconclusive']['count']} of {goals['inconclusive']['of']} inconclusive; "
        f"{rows['seed'].nunique()} seeds, {rows['n_facts'].max()} hidden facts"
    )
    figure.update_layout(barmode="stack", legend={"orientation": "h", "y": -0.16, "traceorder": "normal"})
    return styled(figure, "The verdict on models whose truth is known", subtitle, height=640)


def _words(figure: go.Figure, rows: pd.DataFrame) -> None:
    """A bar a case, the models that know first."""
    truths = rows.groupby("case", sort=False)["truth"].first()
    names = [case for truth in ("never knew", "knows") for case in reversed(truths.index[truths == truth])]
    for word, colour in COLOURS.items():
        counts = rows.loc[rows["word"] == word].groupby("case").size().reindex(names, fill_value=0)
        figure.add_trace(
            go.Bar(
                y=[f"{label(name)}, {truths[name]}" for name in names], x=counts.to_numpy(), name=word, orientation="h",
                marker={"color": colour}, hovertemplate="%{y}<br>" + word + ": %{x} seeds<extra></extra>",
            ),
            row=1, col=1,
        )  # fmt: skip
    figure.update_xaxes(title="seeds", dtick=1, row=1, col=1)


def _by_facts(figure: go.Figure, verdicts: pd.DataFrame) -> None:
    """Right, wrong and undecided against the number of hidden facts."""
    said = verdicts.assign(
        undecided=~verdicts["word"].isin(["hidden", "removed"]),
        wrong=verdicts["word"].isin(["hidden", "removed"]) & ~verdicts["right"],
    )
    for name, colour, dash in (("right", theme.ORIGINAL, "solid"), ("undecided", theme.QUIET, "dash"),
                               ("wrong", theme.BAD, "dot")):  # fmt: skip
        share = said.groupby("n_facts")[name].mean()
        figure.add_trace(
            go.Scatter(
                x=share.index.to_numpy(), y=share.to_numpy(), name=name, mode="lines+markers", showlegend=False,
                line={"color": colour, "dash": dash}, marker={"size": 9},
                hovertemplate=name + ": %{y:.0%} with %{x} hidden facts<extra></extra>",
            ),
            row=1, col=2,
        )  # fmt: skip
        figure.add_annotation(
            x=share.index.max(), y=share.iloc[-1], text=name, showarrow=False, font={"color": colour}, yshift=12,
            xanchor="right", row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(title="hidden facts", type="category", row=1, col=2)
    figure.update_yaxes(title="share of verdicts", range=[-0.03, 1.1], tickformat=".0%", row=1, col=2)


def _power(figure: go.Figure, power: pd.DataFrame) -> None:
    """Mean D of every attack on every kind of suppression, with how many seeds recovered it."""
    mean = power.pivot_table(index="kind", columns="attack", values="D", sort=False)
    recovered = power.pivot_table(index="kind", columns="attack", values="recovers", aggfunc="sum", sort=False)
    accepted = power.groupby("kind", sort=False)["accepted"].mean() * power["seed"].nunique()
    n_seeds = power["seed"].nunique()
    figure.add_trace(
        go.Heatmap(
            z=mean.to_numpy(), x=[label(name) for name in mean.columns],
            y=[f"{label(kind)}<br><i>accepted {accepted[kind]:.0f} of {n_seeds}</i>" for kind in mean.index],
            zmin=0, zmax=1, colorscale=theme.SEQUENTIAL, showscale=False, xgap=2, ygap=2,
            text=[[f"{d:.2f}<br>{int(n)} seeds" for d, n in zip(ds, ns, strict=True)]
                  for ds, ns in zip(mean.to_numpy(), recovered.to_numpy(), strict=True)],
            texttemplate="%{text}", hovertemplate="%{y}, %{x}: D %{z:.3f}<extra></extra>",
        ),
        row=1, col=3,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, row=1, col=3)
    figure.update_xaxes(showgrid=False, tickangle=30, row=1, col=3)
