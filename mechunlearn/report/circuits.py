"""Circuits: how much of the model is enough, and the strongest edges from the embedding to the answer.

Every function takes data and returns a plotly Figure in one theme.
"""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go

from mechunlearn.localize.edges import EdgeScores
from mechunlearn.localize.faithfulness import FaithfulnessCurve
from mechunlearn.report import theme
from mechunlearn.report.circuit_layout import Edge, between, paths, places, reader_node
from mechunlearn.report.heatmaps import margin_of
from mechunlearn.report.theme import label, styled

POSITIVE, NEGATIVE = "#b2182b", "#2166ac"  # the ends of the maps' scale
_WIDEST = 9.0


def faithfulness_curves(curves: Sequence[FaithfulnessCurve], *, completeness: bool = False) -> go.Figure:
    """How much of the facts is left when only the best components stay, by the size of the circuit on a log scale.

    1 is the whole model, 0 the corrupt run. The legend holds CPR (area under f, higher is better) and CMD (area under
    |1 - f|, lower is better).

    Args:
        completeness: draw also, dashed, what is left when the circuit alone is taken away.

    Raises:
        ValueError: no curves.
    """
    if not curves:
        raise ValueError("faithfulness_curves: got no curves, allowed: at least one; make them with faithfulness()")
    figure = go.Figure()
    for curve, colour, symbol in zip(curves, cycle(theme.PALETTE), cycle(theme.SYMBOLS), strict=False):
        name = label(curve.method)
        lines = [(curve.f, "solid", f"{name}: CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}", "circuit alone")]
        if completeness:
            lines.append((curve.completeness, "dash", f"{name}, circuit taken away", "all but the circuit"))
        for values, dash, legend, what in lines:
            hover = [
                f"<b>{name}</b>, {what}<br>best {n} components ({size:.1%})<br>f = {value:.3f}"
                for size, n, value in zip(curve.sizes, curve.n_components, values, strict=True)
            ]
            figure.add_trace(
                go.Scatter(
                    x=list(curve.sizes), y=[float(v) for v in values], name=legend, mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 2.5}, marker={"size": 8, "symbol": symbol},
                    hovertext=hover, hoverinfo="text",
                )
            )  # fmt: skip
    figure.add_hline(y=1, line={"color": theme.QUIET, "dash": "dot"})
    figure.add_hline(y=0, line={"color": theme.QUIET, "dash": "dot"})
    figure.update_xaxes(type="log", title="share of components kept", tickvals=[0.001, 0.01, 0.1, 0.2, 0.5, 1],
                        ticktext=["0.1%", "1%", "10%", "20%", "50%", "100%"])  # fmt: skip
    figure.update_yaxes(title="f: share of the facts left")
    figure.update_layout(legend={"orientation": "v", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"})
    height = 400 + 22 * len(curves) * (1 + completeness)
    figure = styled(figure, "How small a circuit is enough?", "1: as the whole model, 0: as the corrupt run",
                    height=height)  # fmt: skip
    return figure.update_layout(margin_b=70 + 22 * len(curves) * (1 + completeness))


def circuit(edges: EdgeScores, *, n_edges: int = 40, paths_only: bool = True) -> go.Figure:
    """The strongest edges between components, from the embedding (bottom) to the answer (top).

    An edge's width is its size, its colour and line its sign: red and solid supports the true answer, blue and dashed
    speaks against it. Heads are left, MLPs right; keys and values that several heads share are a node of their own.

    Args:
        n_edges: how many of the largest edges are taken, over all parts of a head together.
        paths_only: leave out those of them that lie on no path from embedding to answer.

    Raises:
        ValueError: fewer than one edge, or none on a path: take more.
    """
    strongest = _strongest(edges, n_edges)
    kept = paths(strongest) if paths_only else strongest
    if not kept:
        raise ValueError(f"circuit: none of the {len(strongest)} strongest edges lies on a path from the embedding to "
                         "the answer; raise n_edges or set paths_only=False")  # fmt: skip
    at = places([*(edge.writer for edge in kept), *(edge.reader for edge in kept)])
    largest = max(abs(edge.value) for edge in kept)
    figure = go.Figure()
    for edge in sorted(kept, key=lambda edge: abs(edge.value)):
        x, y = between(at[edge.writer], at[edge.reader])
        positive = edge.value >= 0
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines", showlegend=False, hovertext=edge.text, hoverinfo="text",
                line={"color": POSITIVE if positive else NEGATIVE, "dash": "solid" if positive else "dash",
                      "width": max(0.8, _WIDEST * abs(edge.value) / largest)},
                opacity=0.75,
            )
        )  # fmt: skip
    names = list(at)
    figure.add_trace(
        go.Scatter(
            x=[at[name][0] for name in names], y=[at[name][1] for name in names], mode="markers+text", text=names,
            hoverinfo="text", hovertext=names, showlegend=False, textfont={"size": 12, "color": theme.INK},
            cliponaxis=False,
            marker={"size": 40, "color": "white", "line": {"color": theme.INK, "width": 1.5},
                    "symbol": ["square" if name.startswith("m") else "circle" for name in names]},
        )
    )  # fmt: skip
    figure.update_xaxes(
        visible=False, range=[min(x for x, _ in at.values()) - 0.7, max(x for x, _ in at.values()) + 0.7]
    )
    layers = sorted({int(y) for _, y in at.values()})
    ticks = {y: "embedding" if y == layers[0] else "answer" if y == layers[-1] else f"{(y - 1) // 2}" for y in layers}
    shown = {y: text for y, text in ticks.items() if not text.isdigit() or y % 2 or y - 1 not in layers}  # each once
    figure.update_yaxes(
        tickvals=list(shown), ticktext=list(shown.values()), showgrid=False, zeroline=False, title="layer",
        range=[layers[0] - 0.8, layers[-1] + 0.8],
    )  # fmt: skip
    subtitle = (
        f"{len(kept)} of the {len(strongest)} largest edges{', those on a path' if paths_only else ''}; red: supports "
        f"the true answer, blue and dashed: against it; {label(edges.metric)}; n = {len(edges.per_fact)} facts"
    )
    return styled(figure, "Circuit: the strongest edges", subtitle, height=180 + 44 * len(layers))


def _strongest(edges: EdgeScores, n_edges: int) -> list[Edge]:
    """Edges between nodes: a head's query, key and value are summed fact by fact, the parts are in the text."""
    if n_edges < 1:
        raise ValueError(f"circuit: got n_edges {n_edges}, allowed: 1 and up")
    members: dict[str, list[int]] = {}
    for column, reader in enumerate(edges.readers):
        members.setdefault(reader_node(reader), []).append(column)
    found: list[Edge] = []
    for reader, columns in members.items():
        summed = edges.per_fact[:, :, columns].sum(axis=2)
        values, margins = summed.mean(axis=0), margin_of(summed)
        for w in np.flatnonzero((edges.per_fact[:, :, columns] != 0).any(axis=(0, 2))):
            parts = [f"{edges.readers[c].rpartition('.')[2]} {edges.values[w, c]:+.3f}" for c in columns]
            bounds = (
                f" [{values[w] - margins[w]:+.3f}, {values[w] + margins[w]:+.3f}]" if np.isfinite(margins[w]) else ""
            )
            text = (
                f"<b>{label(edges.writers[w])} → {label(reader)}</b><br>{label(edges.metric)} {values[w]:+.3f}{bounds}"
            )
            text += f"<br>{label(', '.join(parts))}" if len(columns) > 1 else ""
            text += f"<br>n = {len(summed)} facts"
            found.append(Edge(writer=edges.writers[w], reader=reader, value=float(values[w]), text=text))
    return sorted(found, key=lambda edge: -abs(edge.value))[:n_edges]
