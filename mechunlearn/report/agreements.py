"""Localizers side by side: where each points, and how well they agree.

Every function takes data and returns a plotly Figure in one theme.
"""

from collections.abc import Collection, Mapping

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.components import ComponentScores
from mechunlearn.localize.agreement import agreement
from mechunlearn.report import theme
from mechunlearn.report.heatmaps import diverging, hover_text, margin_of, signed
from mechunlearn.report.maps import SUBLAYERS
from mechunlearn.report.theme import label, styled
from mechunlearn.runs import Run


def localizer_profiles(
    scores: Mapping[str, ComponentScores], *, edited: Mapping[str, Collection[str]] | None = None
) -> go.Figure:
    """Where the localizers point: one row a localizer, each scaled by its largest absolute score; dots were edited.

    Heads and neurons are summed within their sublayer; localizers that score everything alike are left out.

    Args:
        scores: by name of the localizer.
        edited: by name of the localizer, the components (m3) that were edited on its word.

    Raises:
        ValueError: no localizer tells components apart.
    """
    shown = {name: found for name, found in scores.items() if np.ptp(found.values) > 0}
    if not shown:
        raise ValueError("localizer_profiles: no localizer tells components apart; run one that is not a control")
    profiles = {name: _by_sublayer(found) for name, found in shown.items()}
    kinds = [kind for kind in SUBLAYERS if any(kind == k for profile in profiles.values() for k, _ in profile)]
    figure = make_subplots(len(kinds), 1, subplot_titles=[SUBLAYERS[kind] for kind in kinds], vertical_spacing=0.25)
    names = list(reversed(profiles))
    for row, kind in enumerate(kinds, start=1):
        layers = sorted({layer for profile in profiles.values() for k, layer in profile if k == kind})
        z, hover = np.full((len(names), len(layers)), np.nan), [[""] * len(layers) for _ in names]
        for i, name in enumerate(names):
            largest = max(abs(value) for value, _ in profiles[name].values()) or 1.0
            for j, layer in enumerate(layers):
                if (kind, layer) not in profiles[name]:
                    continue
                value, margin = profiles[name][kind, layer]
                z[i, j] = value / largest
                where = f"{label(name)}: {kind[0]}{layer}"
                hover[i][j] = hover_text(where, shown[name].metric, value, margin, shown[name].n_facts)
        x = [f"{kind[0]}{layer}" for layer in layers]
        figure.add_trace(signed(z, x, [label(name) for name in names], hover), row=row, col=1)
        marked = [
            (label(name), text)
            for name, parts in (edited or {}).items()
            if name in shown
            for text in parts
            if text in x
        ]
        if marked:
            marks = go.Scatter(
                x=[text for _, text in marked],
                y=[name for name, _ in marked],
                mode="markers",
                showlegend=False,
                marker={"size": 9, "color": "white", "line": {"color": theme.INK, "width": 2}},
                hoverinfo="skip",
            )
            figure.add_trace(marks, row=row, col=1)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    diverging(figure, 1.0, "share of its largest")
    subtitle = "each row scaled by its largest absolute score" + ("; white dots: edited" if edited else "")
    return styled(figure, "Where the localizers point", subtitle, height=130 + len(kinds) * (70 + 34 * len(names)))


def rank_correlations(scores: Mapping[str, ComponentScores]) -> go.Figure:
    """Matrix of Spearman's correlation between every two localizers, over the components that both score.

    1: the same order of components, 0: unrelated, -1: the reverse. Empty where two share fewer than two components or
    one of them tells none apart.

    Raises:
        ValueError: fewer than two scores.
    """
    if len(scores) < 2:
        raise ValueError(f"rank_correlations: got {len(scores)} scores, allowed: at least two to compare")
    names = list(scores)
    z = np.full((len(names), len(names)), np.nan)
    hover = [["" for _ in names] for _ in names]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            where = f"<b>{label(a)}</b> against <b>{label(b)}</b><br>"
            if len(set(scores[a].components) & set(scores[b].components)) < 2:
                hover[i][j] = where + "no components in common"
                continue
            found = agreement(scores[a], scores[b])
            z[i, j] = found["spearman"]
            hover[i][j] = where + (
                f"Spearman {found['spearman']:.2f}, Pearson {found['pearson']:.2f}<br>share of the top "
                f"{found['k']:.0f} in common {found['top_k_recall']:.2f}<br>n = {found['n_components']:.0f} components"
            )
    figure = go.Figure(signed(z, [label(name) for name in names], [label(name) for name in names], hover))
    for i, row in enumerate(z):
        for j, value in enumerate(row):
            known = bool(np.isfinite(value))
            colour = "white" if known and abs(value) > 0.65 else theme.INK
            figure.add_annotation(
                x=j, y=i, text=f"{value:.2f}" if known else "", showarrow=False, font={"color": colour}
            )
    figure.update_xaxes(type="category", showgrid=False, tickangle=-45)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    diverging(figure, 1.0, "Spearman")
    subtitle = "rank correlation over the components that both score; empty: nothing to compare"
    return styled(figure, "Do the localizers agree?", subtitle, height=300 + 34 * len(names))


def localizer_agreement(run: Run) -> go.Figure:
    """How well each pair of localizers agrees: rank correlation, correlation, and overlap of the highest components.

    Raises:
        ValueError: nothing was compared.
    """
    frame = run.agreement
    if frame.empty:
        raise ValueError("localizer_agreement: no two localizers were compared; run at least two")
    pairs = [f"{label(a)}<br>against {label(b)}" for a, b in zip(frame["a"], frame["b"], strict=True)]
    measures = {"spearman": "Spearman", "pearson": "Pearson", "top_k_recall": "share of the top components in common"}
    n = [f", n = {int(v)} components" for v in frame["n_components"]] if "n_components" in frame else [""] * len(frame)
    figure = go.Figure()
    for (column, name), colour, symbol in zip(measures.items(), theme.PALETTE, theme.SYMBOLS, strict=False):
        if column in frame:
            figure.add_trace(
                go.Scatter(
                    x=frame[column],
                    y=pairs,
                    mode="markers",
                    name=name,
                    marker={"size": 14, "color": colour, "symbol": symbol},
                    hovertext=[f"{name} {value:.2f}{text}" for value, text in zip(frame[column], n, strict=True)],
                    hoverinfo="text",
                )
            )
    least = float(np.nanmin([frame[column].min() for column in measures if column in frame] + [0.0]))
    figure.update_xaxes(range=[min(-0.05, least - 0.1), 1.05], zeroline=True, zerolinecolor=theme.QUIET)
    figure.update_yaxes(type="category", autorange="reversed")
    return styled(
        figure,
        "Do the localizers agree?",
        "1: the same order of components, 0: unrelated",
        height=190 + 56 * len(pairs),
    )


def _by_sublayer(scores: ComponentScores) -> dict[tuple[str, int], tuple[float, float]]:
    """Score and half its interval of every sublayer; what lies inside it is summed, fact by fact."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for i, component in enumerate(scores.components):
        key = ("mlp" if component.kind in ("mlp", "neuron") else "attention", component.layer)
        found[key] = found.get(key, 0.0) + scores.per_fact[:, i].sum(axis=1)
    return {key: (float(v.mean()), float(margin_of(v[:, None])[0])) for key, v in found.items()}
