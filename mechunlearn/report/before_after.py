"""Two score maps and their difference on one scale: what an edit did to the lookup."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.report import theme
from mechunlearn.report.heatmaps import diverging, first_prompt, hover_text, margin_of, sign_line, signed
from mechunlearn.report.theme import label, styled

_TITLES = ("before", "after", "after minus before")


def before_after(before: ComponentScores, after: ComponentScores, *, facts: Sequence[Fact] | None = None) -> go.Figure:
    """Heat maps of two scores of the same components and facts, and of their difference, on one scale about zero.

    The difference's interval is of the facts' own differences.

    Args:
        facts: those that were scored; hovering then tells a prompt.

    Raises:
        ValueError: other components, roles, facts or another metric.
    """
    for what in ("components", "roles", "metric", "n_facts", "facts_sha256"):
        if getattr(before, what) != getattr(after, what):
            raise ValueError(f"before_after: the two scores have different {what}, allowed: the same; score both alike")
    per_fact = (before.per_fact, after.per_fact, after.per_fact - before.per_fact)
    means, prompt = [values.mean(axis=0) for values in per_fact], first_prompt(before, facts)
    hover = [
        [[hover_text(f"{component}, {label(role)}: {title}", before.metric, mean[i, j], margin[i, j], before.n_facts,
                     prompt)
          for j, role in enumerate(before.roles)] for i, component in enumerate(before.components)]
        for title, mean, margin in zip(_TITLES, means, map(margin_of, per_fact), strict=True)
    ]  # fmt: skip
    columns = [theme.ROLE_LABELS.get(role, label(role)) for role in before.roles]
    rows = [str(component) for component in before.components]
    figure = _panels(means, rows, columns, hover, before.metric)
    return styled(figure, f"{label(before.method)}: before and after", sign_line(before),
                  height=220 + max(16 * min(len(rows), 40), 220))  # fmt: skip


def maps_before_after(
    before: Float[np.ndarray, "row column"],
    after: Float[np.ndarray, "row column"],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    metric: str = "score",
    prompt: str | None = None,
) -> go.Figure:
    """The same for two maps as arrays, e.g. `patching_map(...).values` over components and tokens.

    Args:
        rows: from bottom to top, e.g. names of components.
        columns: e.g. tokens; escaped, and told apart where they repeat.
        prompt: the text of maps of one prompt, for the hover.

    Raises:
        ValueError: values of another shape than rows x columns.
    """
    wanted = (len(rows), len(columns))
    if before.shape != wanted or after.shape != wanted:
        raise ValueError(f"maps_before_after: got values {before.shape} and {after.shape}, allowed: {wanted} for both")
    values, labels, names = [before, after, after - before], theme.token_labels(columns), [label(row) for row in rows]
    asked = f"<br>n = 1 prompt: {label(prompt)}" if prompt is not None else ""
    hover = [
        [[f"<b>{name}</b> at {text}: {title}<br>{label(metric)} {z[i, j]:+.3f}{asked}" for j, text in enumerate(labels)]
         for i, name in enumerate(names)]
        for title, z in zip(_TITLES, values, strict=True)
    ]  # fmt: skip
    figure = _panels(values, names, labels, hover, metric)
    return styled(figure, "Before and after", "one scale for all three", height=220 + max(16 * min(len(rows), 40), 220))


def _panels(
    values: Sequence[np.ndarray], rows: Sequence[str], columns: Sequence[str],
    hover: Sequence[Sequence[Sequence[str]]], metric: str,
) -> go.Figure:  # fmt: skip
    figure = make_subplots(1, 3, subplot_titles=_TITLES, shared_yaxes=True, horizontal_spacing=0.03)
    for column, (z, text) in enumerate(zip(values, hover, strict=True), start=1):
        figure.add_trace(signed(z, columns, rows, text), row=1, col=column)
    many = len(columns) > 8  # then upright and small: a panel is a third as wide as the figure
    figure.update_xaxes(type="category", showgrid=False, tickangle=-90 if many else -45, dtick=-(-len(columns) // 24),
                        tickfont_size=10 if many else 13)  # fmt: skip
    figure.update_yaxes(type="category", showgrid=False, dtick=max(1, -(-len(rows) // 40)))
    diverging(figure, max(float(np.abs(z).max()) for z in values), metric)
    return figure
