"""One prompt, token by token: what components do there, and what the model would say from there.

Every function takes data and returns a plotly Figure in one theme.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from mechunlearn.components import Component
from mechunlearn.localize.lens_map import LensMap
from mechunlearn.report import theme
from mechunlearn.report.heatmaps import colour_bar, diverging, signed
from mechunlearn.report.theme import label, styled

_MOST_WORDS = 400  # cells with a token written in them; more cannot be read


def layer_by_token(
    values: Float[np.ndarray, "component token"],
    tokens: Sequence[str],
    components: Sequence[Component],
    *,
    metric: str = "score",
    limit: float | None = None,
    prompt: str | None = None,
) -> go.Figure:
    """Heat map of one prompt: what each component does at each token; zero is white.

    Args:
        tokens: as the tokenizer gives them; escaped, and told apart where they repeat.
        components: the rows from bottom to top.
        limit: where the colours end; give two maps the same to compare them. The largest absolute value if not given.
        prompt: the text for the hover; the tokens put together if not given.

    Raises:
        ValueError: values of another shape than components x tokens.
    """
    if values.shape != (len(components), len(tokens)):
        raise ValueError(f"layer_by_token: got values {values.shape}, allowed: ({len(components)}, {len(tokens)})")
    names, labels = [str(c) for c in components], theme.token_labels(tokens)
    asked = label("".join(tokens).strip() if prompt is None else prompt)
    hover = [
        [f"<b>{name}</b> at token {j}: {text}<br>{label(metric)} {values[i, j]:+.3f}<br>n = 1 prompt: {asked}"
         for j, text in enumerate(labels)]
        for i, name in enumerate(names)
    ]  # fmt: skip
    cells = [[name] * len(labels) for name in names]
    figure = go.Figure(signed(values, labels, names, hover, components=cells))
    figure.update_xaxes(type="category", tickangle=-45 if len(tokens) > 8 else 0, showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    diverging(figure, limit or float(np.abs(values).max()), metric)
    return styled(figure, "One prompt, token by token", height=200 + max(20 * len(names), 200))


def lens_by_token(lens: LensMap) -> go.Figure:
    """Heat map of the logit lens on one prompt: P(answer) by stream and token, the likeliest next token in each cell.

    Units: probability among the whole vocabulary, read through the model's own final norm and unembedding.
    """
    labels = theme.token_labels(lens.tokens)
    top = [[label(token.strip()) or "∅" for token in row] for row in lens.top]
    hover = [
        [f"<b>{stream}</b> at token {j}: {text}<br>P({label(lens.answer)}) {lens.p_answer[i, j]:.3f}"
         f"<br>likeliest: {top[i][j]} {lens.p_top[i, j]:.3f}<br>n = 1 prompt: {label(lens.prompt)}"
         for j, text in enumerate(labels)]
        for i, stream in enumerate(lens.streams)
    ]  # fmt: skip
    cells = [["" if stream == "embed" else stream] * len(labels) for stream in lens.streams]
    readable = len(lens.streams) * len(labels) <= _MOST_WORDS
    figure = go.Figure(
        go.Heatmap(
            z=lens.p_answer, x=list(labels), y=list(lens.streams), text=top, hovertext=hover, hoverinfo="text",
            customdata=cells,
            texttemplate="%{text}" if readable else None, textfont={"size": 11}, xgap=1, ygap=1, zmin=0, zmax=1,
            colorscale=theme.SEQUENTIAL, colorbar=colour_bar("P(answer)"),
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", tickangle=-45 if len(labels) > 8 else 0, showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, title="stream after")
    return styled(
        figure, "Logit lens: what each stream would say next",
        f"colour: P({label(lens.answer)}); words: the likeliest token", height=200 + max(22 * len(lens.streams), 200),
    )  # fmt: skip
