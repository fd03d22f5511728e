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
        f"{goals['inconclusive']['count']} of {goals['inconclusive']['of']} inconclusive, "
        f"{goals['invalid']['count']} invalid; {goals['suppressed models accepted']['count']} of "
        f"{goals['suppressed models accepted']['of']} suppressed models accepted; "
        f"{len(set(rows['seed']))} seeds of the same three models, about {rows['n_facts'].mean():.0f} hidden facts"
    )
    figure.update_layout(barmode="stack", legend={"orientation": "h", "y": -0.16, "traceorder": "normal"})
    return styled(figure, "The verdict on models whose truth is known", subtitle, height=640)


def _words(figure: go.Figure, rows: pd.DataFrame) -> None:
    """A bar a case, the models that know first."""
    truths: dict[str, str] = dict(zip(rows["case"], rows["truth"], strict=True))
    names = [name for truth in ("never knew", "knows") for name in reversed(truths) if truths[name] == truth]
    said = list(zip(rows["case"], rows["word"], strict=True))
    for word, colour in COLOURS.items():
        figure.add_trace(
            go.Bar(
                y=[f"{label(name)}, {truths[name]}" for name in names],
                x=[said.count((name, word)) for name in names], name=word, orientation="h",
                marker={"color": colour}, hovertemplate="%{y}<br>" + word + ": %{x} seeds<extra></extra>",
            ),
            row=1, col=1,
        )  # fmt: skip
    figure.update_xaxes(title="seeds", dtick=1, row=1, col=1)


def _by_facts(figure: go.Figure, verdicts: pd.DataFrame) -> None:
    """Right, wrong and undecided against the number of hidden facts."""
    parts = sorted(set(verdicts["share_of_facts"]))
    numbers = [f"{verdicts.loc[verdicts['share_of_facts'] == part, 'n_facts'].mean():.0f}" for part in parts]
    shares: dict[str, list[float]] = {"right": [], "undecided": [], "wrong": []}
    for part in parts:
        rows = verdicts.loc[verdicts["share_of_facts"] == part]
        decided = rows["word"].isin(["hidden", "removed"]).to_numpy()
        right = rows["right"].to_numpy(dtype=bool)
        for name, which in (("right", right), ("undecided", ~decided), ("wrong", decided & ~right)):
            shares[name].append(float(which.mean()))
    styles = {"right": (theme.ORIGINAL, "solid"), "undecided": (theme.QUIET, "dash"), "wrong": (theme.BAD, "dot")}
    for name, (colour, dash) in styles.items():
        figure.add_trace(
            go.Scatter(
                x=numbers, y=shares[name], name=name, mode="lines+markers", showlegend=False,
                line={"color": colour, "dash": dash}, marker={"size": 9},
                hovertemplate=name + ": %{y:.0%} with %{x} hidden facts<extra></extra>",
            ),
            row=1, col=2,
        )  # fmt: skip
        figure.add_annotation(
            x=len(numbers) - 1, y=shares[name][-1], text=name, showarrow=False, font={"color": colour}, yshift=12,
            xanchor="right", row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(title="hidden facts", type="category", row=1, col=2)
    figure.update_yaxes(title="share of verdicts", range=[-0.03, 1.1], tickformat=".0%", row=1, col=2)


def _power(figure: go.Figure, power: pd.DataFrame) -> None:
    """Mean D of every attack on every kind of suppression, with how many seeds recovered it."""
    kinds, attacks = list(dict.fromkeys(power["kind"])), list(dict.fromkeys(power["attack"]))
    n_seeds = len(set(power["seed"]))
    means, texts, names = [], [], []
    for kind in kinds:
        own = power.loc[power["kind"] == kind]
        n_accepted = len(set(own.loc[own["accepted"].to_numpy(dtype=bool), "seed"]))
        names.append(f"{label(kind)}<br><i>accepted {n_accepted} of {n_seeds}</i>")
        cells = [own.loc[own["attack"] == attack] for attack in attacks]
        means.append([float(cell["D"].to_numpy().mean()) for cell in cells])
        counts = [int(cell["recovers"].to_numpy().sum()) for cell in cells]
        texts.append([f"{d:.2f}<br>{n} seeds" for d, n in zip(means[-1], counts, strict=True)])
    figure.add_trace(
        go.Heatmap(
            z=means, x=[label(name) for name in attacks], y=names, zmin=0, zmax=1, colorscale=theme.SEQUENTIAL,
            showscale=False, xgap=2, ygap=2, text=texts, texttemplate="%{text}",
            hovertemplate="%{y}, %{x}: D %{z:.3f}<extra></extra>",
        ),
        row=1, col=3,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, row=1, col=3)
    figure.update_xaxes(showgrid=False, tickangle=30, row=1, col=3)
