"""Figures as pictures: PNG files through kaleido, which needs a browser."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mechunlearn.files import whole_file


def save_png(
    figure: go.Figure, path: str | Path, *, width: int = 900, height: int | None = None, scale: float = 2
) -> Path:
    """Write a figure as PNG on white, all or nothing.

    Args:
        width, height: in CSS pixels; the figure's own height if not given.
        scale: picture pixels for one CSS pixel.

    Raises:
        ValueError: kaleido is not installed, or finds no Chrome or Chromium.
    """
    layout: Any = figure.layout
    white = go.Figure(figure).update_layout(paper_bgcolor="white", plot_bgcolor="white")
    try:
        data = white.to_image(format="png", width=width, height=height or layout.height or 500, scale=scale)
    except (ValueError, ImportError, RuntimeError) as error:
        missing = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"PNG export: {missing}; install kaleido and Chrome or Chromium, or write HTML with figure.write_html"
        ) from None
    with whole_file(path) as partial:
        partial.write_bytes(data)
    return Path(path)
