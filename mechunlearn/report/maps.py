"""What localizers and patching found: maps of scores over layers, roles, heads and tokens.

Every function takes data and returns a plotly Figure in one theme.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mechunlearn.components import Component, ComponentScores
from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled
from mechunlearn.runs import Run

SUBLAYERS = {"mlp": "MLPs", "attention": "attention"}


def component_by_role(scores: ComponentScores, *, limit: float | None = None) -> go.Figure:
    """Heat map of the score of every layer at every role of token, MLPs and attention side by side.

    Sign and units: those of the scores; both panels share one scale, symmetric about zero.

    Args:
        limit: end of the colour scale, to compare figures; the largest absolute score if not given.

    Raises:
        ValueError: the scores hold neither MLPs nor attention sublayers.
    """
    kinds = [kind for kind in SUBLAYERS if any(c.kind == kind for c in scores.components)]
    if not kinds:
        raise ValueError(f"component_by_role: scores of '{scores.method}' hold no MLPs or attention; use layer_by_head")
    limit = limit or float(np.abs(scores.by_role).max()) or 1.0
    errors = _standard_error(scores.per_fact)
    figure = make_subplots(
        1, len(kinds), subplot_titles=[SUBLAYERS[kind] for kind in kinds], shared_yaxes=True, horizontal_spacing=0.06
    )
    layers = sorted({c.layer for c in scores.components})
    for column, kind in enumerate(kinds, start=1):
        at = {c.layer: i for i, c in enumerate(scores.components) if c.kind == kind}
        present = [layer for layer in layers if layer in at]
        rows = [at[layer] for layer in present]
        hover = [
            [
                _hover(
                    label(f"{scores.components[i]}, {role}"),
                    scores.metric,
                    scores.by_role[i, j],
                    errors[i, j],
                    scores.n_facts,
                )
                for j, role in enumerate(scores.roles)
            ]
            for i in rows
        ]
        roles = [theme.ROLE_LABELS.get(role, label(role)) for role in scores.roles]
        figure.add_trace(_signed(scores.by_role[rows], roles, present, hover), row=1, col=column)
    figure.update_xaxes(tickangle=-40)
    figure.update_yaxes(dtick=max(1, len(layers) // 12), showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", row=1, col=1)
    _diverging(figure, limit, scores.metric)
    title = f"{label(scores.method)}: score by layer and token"
    return styled(figure, title, _sign_line(scores), height=190 + max(20 * len(layers), 220))


def layer_by_head(scores: ComponentScores) -> go.Figure:
    """Heat map of the score of every attention head, summed over token roles; zero is white.

    Raises:
        ValueError: the scores hold no heads.
    """
    at = {(c.layer, c.index): i for i, c in enumerate(scores.components) if c.kind == "head"}
    if not at:
        raise ValueError(f"layer_by_head: scores of '{scores.method}' hold no heads; use component_by_role")
    layers, heads = sorted({layer for layer, _ in at}), sorted({index or 0 for _, index in at})
    values = np.full((len(layers), len(heads)), np.nan)
    hover = [["" for _ in heads] for _ in layers]
    for (layer, index), i in at.items():
        row, column = layers.index(layer), heads.index(index or 0)
        values[row, column] = scores.values[i]
        hover[row][column] = _hover(
            str(scores.components[i]), scores.metric, scores.values[i], scores.standard_error[i], scores.n_facts
        )
    limit = float(np.nanmax(np.abs(values))) or 1.0
    figure = go.Figure(_signed(values, heads, layers, hover))
    figure.update_xaxes(title="head", dtick=max(1, len(heads) // 16), showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", dtick=max(1, len(layers) // 12), showgrid=False, zeroline=False)
    _diverging(figure, limit, scores.metric)
    height = 190 + max(20 * len(layers), 220)
    return styled(figure, f"{label(scores.method)}: score by head", _sign_line(scores), height=height)


def layer_by_token(
    values: Float[np.ndarray, "component token"],
    tokens: Sequence[str],
    components: Sequence[Component],
    *,
    metric: str = "score",
    limit: float | None = None,
) -> go.Figure:
    """Heat map of one prompt: what each component does at each token; zero is white.

    Args:
        tokens: as the tokenizer gives them; escaped, and told apart where they repeat.
        components: the rows from bottom to top.
        limit: where the colours end; give two maps the same to compare them. The largest absolute value if not given.

    Raises:
        ValueError: values of another shape than components x tokens.
    """
    if values.shape != (len(components), len(tokens)):
        raise ValueError(f"layer_by_token: got values {values.shape}, allowed: ({len(components)}, {len(tokens)})")
    names, labels = [str(c) for c in components], theme.token_labels(tokens)
    hover = [
        [f"<b>{name}</b> at token {j}: {text}<br>{label(metric)} {values[i, j]:+.3f}" for j, text in enumerate(labels)]
        for i, name in enumerate(names)
    ]
    figure = go.Figure(_signed(values, labels, names, hover))
    figure.update_xaxes(type="category", tickangle=-45 if len(tokens) > 8 else 0, showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    _diverging(figure, limit or float(np.abs(values).max()), metric)
    return styled(figure, "One prompt, token by token", height=200 + max(20 * len(names), 200))


def localizer_profiles(run: Run) -> go.Figure:
    """Where the localizers point: one row a localizer, each scaled by its largest absolute score; dots were edited.

    Heads and neurons are summed within their sublayer; localizers that score everything alike are left out.

    Raises:
        ValueError: no localizer tells components apart.
    """
    shown = {name: scores for name, scores in run.scores.items() if np.ptp(scores.values) > 0}
    if not shown:
        raise ValueError("localizer_profiles: no localizer tells components apart; run one that is not a control")
    profiles = {name: _by_sublayer(scores) for name, scores in shown.items()}
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
                value, error = profiles[name][kind, layer]
                z[i, j] = value / largest
                where = f"{label(name)}: {kind[0]}{layer}"
                hover[i][j] = _hover(where, shown[name].metric, value, error, shown[name].n_facts)
        x = [f"{kind[0]}{layer}" for layer in layers]
        figure.add_trace(_signed(z, x, [label(name) for name in names], hover), row=row, col=1)
        edited = [
            (label(c.localizer), text) for c in run.cells if c.localizer in shown for text in c.components if text in x
        ]
        if edited:
            marks = go.Scatter(
                x=[text for _, text in edited],
                y=[name for name, _ in edited],
                mode="markers",
                showlegend=False,
                marker={"size": 9, "color": "white", "line": {"color": theme.INK, "width": 2}},
                hoverinfo="skip",
            )
            figure.add_trace(marks, row=row, col=1)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    _diverging(figure, 1.0, "share of its largest")
    subtitle = "each row scaled by its largest absolute score; white dots: edited"
    return styled(figure, "Where the localizers point", subtitle, height=130 + len(kinds) * (70 + 34 * len(names)))


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


def _signed(z: np.ndarray, x: Sequence[Any], y: Sequence[Any], hover: Sequence[Sequence[str]]) -> go.Heatmap:
    return go.Heatmap(
        z=z,
        x=list(x),
        y=list(y),
        text=hover,
        hoverinfo="text",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        coloraxis="coloraxis",
    )


def _diverging(figure: go.Figure, limit: float, metric: str) -> None:
    """One colour scale for all panels, symmetric about zero."""
    limit = limit or 1.0
    bar = {"title": {"text": label(metric), "side": "right", "font": {"size": 14}}, "thickness": 16}
    figure.update_layout(coloraxis={"colorscale": theme.DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar})


def _hover(where: str, metric: str, value: float, error: float, n: int) -> str:
    spread = f" ± {error:.3f} (standard error)" if np.isfinite(error) else ""
    return f"<b>{where}</b><br>{label(metric)} {value:+.3f}{spread}<br>n = {n} facts"


def _standard_error(per_fact: np.ndarray) -> np.ndarray:
    n = len(per_fact)
    return per_fact.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full(per_fact.shape[1:], np.nan)


def _by_sublayer(scores: ComponentScores) -> dict[tuple[str, int], tuple[float, float]]:
    """Score and standard error of every sublayer; what lies inside it is summed, fact by fact."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for i, component in enumerate(scores.components):
        key = ("mlp" if component.kind in ("mlp", "neuron") else "attention", component.layer)
        found[key] = found.get(key, 0.0) + scores.per_fact[:, i].sum(axis=1)
    return {key: (float(v.mean()), float(_standard_error(v[:, None])[0])) for key, v in found.items()}


def _sign_line(scores: ComponentScores) -> str:
    return f"{label(scores.sign)}; n = {scores.n_facts} facts"
