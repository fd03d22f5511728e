"""A live explorer for JupyterLab: pick a fact and a localizer, look at the maps, change a component, see the answer.

Widgets only; `exploration` computes. With anywidget the maps can be clicked, without it they are shown as they are.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, cast

import ipywidgets as widgets
import plotly.graph_objects as go

from mechunlearn.components import Component, ComponentScores
from mechunlearn.exploration import HOWS, Exploration, Outcome
from mechunlearn.facts import Fact
from mechunlearn.html_card import html_card
from mechunlearn.localize import LOCALIZERS
from mechunlearn.models import Model, NotSupported, all_components
from mechunlearn.report import figures

ALL_TOKENS = "all tokens"


def explore(
    model: Model, facts: Sequence[Fact], *, localizer: str = "attribution_patching", view: str = "this prompt, exact",
    seed: int = 0,
) -> "Explorer":  # fmt: skip
    """Explore facts by hand: the last line of a notebook's cell.

    Args:
        facts: all are scored by the localizer that is picked, so take a few dozen for the slow ones; a fact's donor is
            one of them.
        localizer: picked at first.
        view: shown at first: "this prompt", "this prompt, exact", "logit lens", "all facts" or "fact by fact".
        seed: of the donors.

    Returns:
        A widget. Its `exploration` gives what it shows as data.

    Raises:
        ValueError: no facts, a fact that cannot be paired, an unknown localizer or view.
    """
    LOCALIZERS.get(localizer)
    return Explorer(Exploration(model, facts, seed=seed), localizer=localizer, view=view)


class Explorer(widgets.VBox):
    """Controls above, runs and map below, what an intervention does at the end."""

    def __init__(self, exploration: Exploration, *, localizer: str, view: str) -> None:
        self.exploration = exploration
        self.views: Mapping[str, Callable[[], go.Figure]] = {
            "this prompt": self._by_token,
            "this prompt, exact": self._patching,
            "logit lens": lambda: figures.lens_by_token(self.exploration.lens(self.fact.value)),
            "all facts": self._all_facts,
            "fact by fact": lambda: figures.component_by_fact(self._scores(), self.exploration.facts),
        }
        if view not in self.views:
            raise ValueError(f"explore: got view {view!r}, allowed: {', '.join(self.views)}")
        asked = [(f"{f.ask(f.prompt)} → {f.target_true}", i) for i, f in enumerate(exploration.facts)]
        components = all_components(exploration.model, ("mlp", "attention", "head"))
        wide = widgets.Layout(width="46%")
        # Any: every value of a widget may be None to its types, and none of these is
        self.fact: Any = widgets.Dropdown(options=asked, description="fact", layout=wide)
        self.localizer: Any = widgets.Dropdown(options=LOCALIZERS.names(), value=localizer, description="localizer")
        self.metric: Any = widgets.Dropdown(description="metric")
        self.view: Any = widgets.Dropdown(options=list(self.views), value=view, description="map")
        self.component: Any = widgets.Combobox(
            options=[str(c) for c in components], value=str(components[0]), description="component",
            placeholder="m3, a5, a5.h2, m3.n117", continuous_update=False,
        )  # fmt: skip
        self.position: Any = widgets.Dropdown(description="token")
        self.how: Any = widgets.ToggleButtons(options=HOWS, description="becomes")
        self.runs = widgets.HTML()
        self.map, self.answers, self.changed = widgets.VBox(), widgets.VBox(layout=wide), widgets.VBox(layout=wide)
        super().__init__([
            widgets.HBox([self.fact, self.view]), widgets.HBox([self.localizer, self.metric]), self.runs,
            self.map, widgets.HBox([self.component, self.position, self.how]),
            widgets.HBox([self.answers, self.changed]),
        ])  # fmt: skip
        self._choose_metrics()
        self._choose_fact()
        self.fact.observe(lambda _: self._choose_fact(), "value")
        self.localizer.observe(lambda _: self._choose_localizer(), "value")
        for control in (self.metric, self.view):
            control.observe(lambda _: self._show_map(), "value")
        for control in (self.component, self.position, self.how):
            control.observe(lambda _: self._show_change(), "value")

    def _choose_metrics(self) -> None:
        self.metric.options = self.exploration.metrics(self.localizer.value) or ("its own",)

    def _choose_localizer(self) -> None:
        before = self.metric.value
        self._choose_metrics()
        if self.metric.value == before:  # else its own observer shows the map
            self._show_map()

    def _choose_fact(self) -> None:
        tokens = self.exploration.tokens(self.fact.value)
        self.position.options = [(ALL_TOKENS, None), *((f"{i}: {token}", i) for i, token in enumerate(tokens))]
        runs = self.exploration.runs(self.fact.value)
        outcome = runs.outcome
        self.runs.value = html_card(
            f"{self.exploration.facts[self.fact.value].subject} (clean) and {runs.donor or 'random tokens'} (corrupt)",
            {
                "clean": "".join(runs.clean), "corrupt": "".join(runs.corrupt),
                "logit difference": f"{outcome.logit_diff_before:+.2f} clean, {outcome.logit_diff_after:+.2f} corrupt",
            },
        )  # fmt: skip
        self._show(self.answers, _bars(outcome, ("clean run", "corrupt run"), "the two runs"))
        self._show_map()
        self._show_change()

    def _show_map(self) -> None:
        self._try(self.map, self.views[self.view.value])

    def _show_change(self) -> None:
        def changed() -> go.Figure:
            component = Component.parse(self.component.value.strip())
            outcome = self.exploration.intervene(self.fact.value, component, self.how.value, self.position.value)
            where = ALL_TOKENS if self.position.value is None else f"token {self.position.value}"
            moved = f"logit difference {outcome.logit_diff_before:+.2f} → {outcome.logit_diff_after:+.2f}"
            return _bars(outcome, ("clean run", "changed"), f"{component} at {where}: {self.how.value}; {moved}")

        self._try(self.changed, changed)

    def _try(self, area: widgets.VBox, make: Callable[[], go.Figure]) -> None:
        """Show the figure, or in one line why there is none."""
        area.children = (widgets.HTML("<i>computing …</i>"),)
        try:
            self._show(area, make())
        except (ValueError, NotSupported) as error:
            area.children = (widgets.HTML(html_card("nothing to show", {"why": error})),)

    def _show(self, area: widgets.VBox, figure: go.Figure) -> None:
        if find_spec("anywidget"):
            live: Any = go.FigureWidget(figure)
            for trace in live.data:
                if trace.type == "heatmap":
                    trace.on_click(self.click)
            area.children = (live,)
        else:  # plotly's FigureWidget needs anywidget
            data = {"application/vnd.plotly.v1+json": json.loads(cast(str, figure.to_json()))}
            area.children = (widgets.Output(outputs=({"output_type": "display_data", "data": data, "metadata": {}},)),)

    def click(self, trace: Any, points: Any, _state: object = None) -> None:
        """Choose the component, and on a map of one prompt the token, that was clicked."""
        if trace.customdata is None or not len(points.ys):
            return
        row, column = list(trace.y).index(points.ys[0]), list(trace.x).index(points.xs[0])
        token = column if self.view.value.startswith("this prompt") else None
        with self.component.hold_trait_notifications():
            self.position.value = token
            self.component.value = str(trace.customdata[row][column])

    def _scores(self) -> ComponentScores:
        metric = self.metric.value if self.exploration.metrics(self.localizer.value) else None
        return self.exploration.scores(self.localizer.value, metric)

    def _by_token(self) -> go.Figure:
        scores, fact = self._scores(), self.fact.value
        values = self.exploration.token_scores(fact, scores)
        figure = figures.layer_by_token(values, self.exploration.tokens(fact), scores.components, metric=scores.metric)
        return figure.update_layout(title={
            "text": f"{scores.method}: this prompt",
            "subtitle": {"text": "scored by role; a role's tokens share its score evenly"},
        })  # fmt: skip

    def _patching(self) -> go.Figure:
        found = self.exploration.patching(self.fact.value)
        return figures.layer_by_token(found.values, found.tokens, found.components, metric="share restored")

    def _all_facts(self) -> go.Figure:
        scores = self._scores()
        heads = all(component.kind == "head" for component in scores.components)
        return figures.layer_by_head(scores) if heads else figures.component_by_role(scores)


def _bars(outcome: Outcome, names: tuple[str, str], subtitle: str) -> go.Figure:
    return figures.answers(outcome.before, outcome.after, true=outcome.true, names=names, subtitle=subtitle)
