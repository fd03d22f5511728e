"""A figure in a notebook that is drawn anew in place, is as wide as its column, and tells which cell was clicked.

plotly's own FigureWidget sends all of plotly.js, 5 MB, with every figure, and under anywidget stays 700 pixels wide.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anywidget
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs


class LiveFigure(anywidget.AnyWidget):
    """An empty place for figures.

    Args:
        with_plotly: bring plotly.js along; one figure of those shown together must.
        on_click: told the component and the column of a clicked cell of a map that names components.
    """

    _esm = Path(__file__).with_suffix(".js")
    plotlyjs = traitlets.Unicode().tag(sync=True)
    figure = traitlets.Dict().tag(sync=True)
    """What is shown, as plotly's JSON."""
    note = traitlets.Unicode().tag(sync=True)
    """HTML over the figure, which pales; none if empty."""

    def __init__(
        self, *, with_plotly: bool = False, on_click: Callable[[str, int], None] | None = None, **traits: Any
    ) -> None:
        super().__init__(plotlyjs=get_plotlyjs() if with_plotly else "", **traits)
        if on_click:
            self.on_msg(lambda _widget, clicked, _buffers: on_click(clicked["component"], clicked["column"]))

    def show(self, figure: go.Figure | None) -> None:
        """Show another figure, or none, in this one's place."""
        self.figure = json.loads(cast(str, figure.to_json())) if figure is not None else {}
