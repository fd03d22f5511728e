"""One look for all figures: colours that colour-blind readers can tell apart, large type, calm axes."""

import html
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechunlearn.statistics import Interval

# Okabe & Ito 2008 (jfly.uni-koeln.de/color), without black and yellow, which vanish on a dark or a light page
EDITED, TWIN, ORIGINAL, BAD, OTHER, LIGHT = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PALETTE = (EDITED, BAD, ORIGINAL, OTHER, TWIN, LIGHT)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "hexagon", "pentagon")
QUIET = "#8a8f98"
INK, GRID = "#2b3038", "rgba(138, 143, 152, 0.25)"
DIVERGING = "RdBu_r"  # zero is white; a scale that uses it is always symmetric about zero
SEQUENTIAL = "Blues"

ROLE_LABELS = {
    "subject_first": "subject first",
    "subject_middle": "subject middle",
    "subject_last": "subject last",
    "between": "between",
    "last": "last token",
    "all": "all",
    "subject_mean": "mean over subject",
}


def template() -> go.layout.Template:
    """Build the theme; backgrounds are clear, so that a figure sits on a light page as well as on a dark one."""
    axis = {
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": QUIET,
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 14}},
        "tickfont": {"size": 13},
    }
    return go.layout.Template(
        layout={
            "font": {
                "family": "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif",
                "size": 14,
                "color": INK,
            },
            "title": {
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 12, "l": 6},
                "font": {"size": 17},
                "subtitle": {"font": {"size": 13, "color": QUIET}},
            },
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": PALETTE,
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"},
            "margin": {"l": 10, "r": 16, "t": 96, "b": 16},
            "hoverlabel": {"align": "left"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": QUIET, "activecolor": EDITED},
        }
    )


def styled(figure: go.Figure, title: str, subtitle: str = "", *, height: int = 420) -> go.Figure:
    """Give a figure its theme, title and height; the texts may hold plotly's own tags, so escape what is not ours."""
    figure.update_annotations(font_size=14)  # titles of panels; plotly makes them larger than the figure's own
    lines = textwrap.wrap(subtitle, 66, break_long_words=False) or [""]
    figure.update_layout(
        template=template(),
        title={"text": title, "subtitle": {"text": "<br>".join(lines)}},
        height=height + 17 * (len(lines) - 1),
        margin_t=96 + 17 * (len(lines) - 1),
    )
    return figure


def label(text: object) -> str:
    """Text from a model or a file as a plotly label: plotly reads some HTML in labels and would act on it.

    Quotes stay, for plotly does not turn `&quot;` back.
    """
    return html.escape(str(text), quote=False)


def token_labels(tokens: Sequence[str]) -> tuple[str, ...]:
    """Tokens as axis labels: escaped, spaces and line breaks visible, and the second "the" told from the first."""
    seen: Counter[str] = Counter()
    labels = []
    for token in tokens:
        shown = label(token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")) or "∅"
        seen[shown] += 1
        labels.append(shown if seen[shown] == 1 else f"{shown} ({seen[shown]})")
    return tuple(labels)


def error_bars(*intervals: Interval) -> dict[str, Any]:
    """Error bars from bounds; none where an interval has no bounds."""
    return {
        "type": "data",
        "symmetric": False,
        "thickness": 1.5,
        "width": 3,
        "array": _finite(i.upper - i.value for i in intervals),
        "arrayminus": _finite(i.value - i.lower for i in intervals),
    }


def _finite(lengths: Iterable[float]) -> list[float]:
    return [max(float(x), 0.0) if np.isfinite(x) else 0.0 for x in lengths]


def interval_words(interval: Interval) -> str:
    """Estimate, bounds if there are any, and number of facts, for a hover text."""
    if not np.isfinite(interval.lower):
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} [{interval.lower:.2f}, {interval.upper:.2f}], n = {interval.n}"
