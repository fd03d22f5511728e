"""What the model answers, and how that changes: one bar a candidate."""

from collections.abc import Mapping

import plotly.graph_objects as go

from mechunlearn.report import theme
from mechunlearn.report.theme import label, styled


def answers(
    before: Mapping[str, float], after: Mapping[str, float] | None = None, *, true: str | None = None,
    names: tuple[str, str] = ("before", "after"), subtitle: str = "",
) -> go.Figure:  # fmt: skip
    """Bars of each answer's probability, before and after an intervention; the true answer is bold.

    Args:
        after: of the same answers; left out if None.
        subtitle: escaped.

    Raises:
        ValueError: no answers, or others after than before.
    """
    if not before or (after is not None and set(after) != set(before)):
        raise ValueError(
            f"answers: got {len(before)} before and {len(after or ())} after, allowed: the same, at least one"
        )
    shown = [f"<b>{label(answer)}</b>" if answer == true else label(answer) or "∅" for answer in before]
    series = [(names[0], before, theme.QUIET)] + ([(names[1], after, theme.EDITED)] if after is not None else [])
    figure = go.Figure(
        [
            go.Bar(
                y=list(range(len(before))), x=[values[answer] for answer in before], name=label(name), orientation="h",
                marker={"color": colour},
                hovertext=[f"{text}<br>{label(name)} {values[answer]:.3f}"
                           for text, answer in zip(shown, before, strict=True)],
                hoverinfo="text",
            )
            for name, values, colour in series
        ]
    )  # fmt: skip
    figure.update_xaxes(title="probability", range=[0, 1.02])
    figure.update_yaxes(tickvals=list(range(len(before))), ticktext=shown, autorange="reversed", showgrid=False)
    figure.update_layout(barmode="group", bargap=0.3)
    return styled(figure, "What the model answers", label(subtitle), height=210 + 30 * len(before)).update_layout(
        margin_b=76
    )
