"""Why a guard acts: the score of its gate along a text, token by token."""

from collections.abc import Sequence

import plotly.graph_objects as go

from mechunlearn.features.evidence import fired_in
from mechunlearn.features.guard import Guard
from mechunlearn.models import Model
from mechunlearn.prompts import encode, token_texts
from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled, token_labels


def gate_figure(model: Model, guard: Guard, texts: Sequence[str]) -> go.Figure:
    """One line a text: the gate's score at each token; filled where the gate is open and a chosen feature is on.

    Units: those of the gate (a share of tokens, or nats for cusum); the dashed line is the threshold. What is filled is
    clamped.

    Raises:
        ValueError: a guard without a gate, which is always open.
    """
    if guard.gate is None:
        raise ValueError(f"gate: guard '{guard.method}' has none, it is always open; give one with a gate")
    own = guard.dictionary.to(model.device)
    flags = fired_in(model, own, texts)[1].flags(guard.places, own.d_sae)
    figure, n_hot = go.Figure(), 0
    for number, (text, (on, content)) in enumerate(zip(texts, flags, strict=True)):
        ids = encode(model, [text])[0][: len(content)]
        scores = guard.gate.scores(on[None], content[None])[0].tolist()
        hot = (guard.gate.is_open(on[None], content[None], {})[0] & on)[: len(ids)]
        n_hot += bool(hot.any())
        colour = theme.PALETTE[number % len(theme.PALETTE)]
        figure.add_trace(
            go.Scatter(
                x=list(range(len(ids))), y=scores[: len(ids)], mode="lines+markers", name=label(text),
                text=token_labels(token_texts(model, ids)), line={"color": colour},
                marker={"size": 10, "symbol": ["circle" if is_hot else "circle-open" for is_hot in hot]},
                hovertemplate="%{text}: %{y:.2f}<extra></extra>",
            )
        )  # fmt: skip
    figure.add_hline(y=guard.gate.threshold, line={"dash": "dash", "color": theme.QUIET})
    figure.update_xaxes(title_text="token")
    figure.update_yaxes(title_text=f"score ({guard.gate.kind})", rangemode="tozero")
    subtitle = f"{n_hot} of {len(texts)} texts are clamped somewhere (filled); dashed: threshold"
    return styled(figure, f"The gate of {label(guard.method)}, token by token", subtitle, height=420 + 18 * len(texts))
