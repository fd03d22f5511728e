"""What all heat maps share: signed cells, one scale symmetric about zero, and hover texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from scipy import stats

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.report import theme
from mechunlearn.report.theme import label

_MOST_GAPS = 64  # with more cells side by side, gaps would cover them


def signed(
    z: np.ndarray,
    x: Sequence[Any],
    y: Sequence[Any],
    hover: Sequence[Sequence[str]],
    *,
    components: Sequence[Sequence[str]] | None = None,
) -> go.Heatmap:
    """Cells on the figure's one colour axis; NaN is empty.

    Args:
        components: the component of each cell, kept for who is told of a click.
    """
    return go.Heatmap(
        z=z,
        x=list(x),
        y=list(y),
        text=hover,
        customdata=components,
        hoverinfo="text",
        hoverongaps=False,
        xgap=1 if len(x) <= _MOST_GAPS else 0,
        ygap=1 if len(y) <= _MOST_GAPS else 0,
        coloraxis="coloraxis",
    )


def diverging(figure: go.Figure, limit: float, metric: str) -> None:
    """One colour scale for all panels, symmetric about zero."""
    limit = limit or 1.0
    figure.update_layout(
        coloraxis={"colorscale": theme.DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": colour_bar(metric)}
    )


def colour_bar(title: str) -> dict[str, Any]:
    """A slim colour bar; the empty first line keeps the turned title off the numbers."""
    return {"title": {"text": f"<br>{label(title)}", "side": "right", "font": {"size": 14}}, "thickness": 16}


def hover_text(where: str, metric: str, value: float, margin: float, n: int, prompt: str = "") -> str:
    """Where, the value with its interval if there is one, n, and a prompt; `where` and `prompt` are ours or escaped."""
    bounds = f" [{value - margin:+.3f}, {value + margin:+.3f}]" if np.isfinite(margin) else ""
    asked = f"<br>prompt: {prompt}" if prompt else ""
    return f"<b>{where}</b><br>{label(metric)} {value:+.3f}{bounds}<br>n = {n} fact{'s' if n > 1 else ''}{asked}"


def first_prompt(scores: ComponentScores, facts: Sequence[Fact] | None) -> str:
    """The prompt of the first fact that was scored, and how many others there are; escaped, nothing without facts.

    Raises:
        ValueError: other facts than were scored.
    """
    if facts is None:
        return ""
    if len(facts) != scores.n_facts:
        raise ValueError(f"scores of '{scores.method}': got {len(facts)} facts, allowed: the {scores.n_facts} scored")
    return label(facts[0].ask(facts[0].prompt)) + (f", and {len(facts) - 1} others" if len(facts) > 1 else "")


def margin_of(per_fact: Float[np.ndarray, "fact ..."]) -> np.ndarray:
    """Half the width of the 95% interval (Student's t) of the mean over facts; NaN for a single fact."""
    n = len(per_fact)
    if n < 2:
        return np.full(per_fact.shape[1:], np.nan)
    return stats.t.ppf(0.975, n - 1) * per_fact.std(axis=0, ddof=1) / np.sqrt(n)


def sign_line(scores: ComponentScores) -> str:
    """What a positive number means, and how many facts there are: the subtitle of every map."""
    return f"{label(scores.sign)}; n = {scores.n_facts} fact{'s' if scores.n_facts > 1 else ''}"
