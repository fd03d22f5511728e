"""A live explorer for JupyterLab: pick a fact and a localizer, look at the maps, change a component, see the answer.

Widgets only; `exploration` computes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go

from mechunlearn.components import Component, ComponentScores
from mechunlearn.exploration import RUNS, Exploration, Outcome
from mechunlearn.facts import Fact
from mechunlearn.html_card import html_card
from mechunlearn.localize import LOCALIZERS
from mechunlearn.models import Model, NotSupported, all_components
from mechunlearn.report import figures
from mechunlearn.report.live_figure import LiveFigure
from mechunlearn.report.theme import label, styled

ALL_TOKENS = ("all tokens", -1)  # None would leave a dropdown empty
OF_ALL_FACTS = ("all facts", "fact by fact")
"""Maps that are the same whichever fact is picked."""
_HOWS = (("zero", "zero"), ("mean", "mean"), ("other run's", "donor"))
_HOW_TIPS = (
    "it writes nothing",
    "its mean over the facts, at tokens of the same role",
    "what it writes on the other run, at the token's partner",
)
_RUN_TIPS = ("change the fact's own run: is the answer lost?", "change the donor's run: does the answer return?")
_WRAPS = widgets.Layout(flex_flow="row wrap")


def explore(
    model: Model, facts: Sequence[Fact], *, retain: Sequence[Fact] | None = None, twin: Model | None = None,
    localizer: str = "attribution_patching", view: str = "this prompt, exact", seed: int = 0,
) -> "Explorer":  # fmt: skip
    """Explore facts by hand: the last line of a notebook's cell.

    Args:
        facts: all are scored by the localizer that is picked, so take a few dozen for the slow ones; a fact's donor is
            one of them.
        retain: facts to keep, for the localizers that contrast with them (`forget_retain_contrast` needs some).
        twin: a model that never knew the facts, for the localizers that compare with one.
        localizer: picked at first.
        view: shown at first: "this prompt", "this prompt, exact", "logit lens", "all facts" or "fact by fact".
        seed: of the donors and of what localizers draw.

    Returns:
        A widget. Its `exploration` gives what it shows as data.

    Raises:
        ValueError: no facts, a fact that cannot be paired, an unknown localizer or view.
    """
    LOCALIZERS.get(localizer)
    return Explorer(Exploration(model, facts, retain=retain, twin=twin, seed=seed), localizer=localizer, view=view)


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
        # Any: every value of a widget may be None to its types, and none of these is
        self.fact: Any = widgets.Dropdown(
            options=asked, description="fact", layout=widgets.Layout(flex="1 1 300px", max_width="620px")
        )
        self.view: Any = widgets.Dropdown(options=list(self.views), value=view, description="map")
        self.localizer: Any = widgets.Dropdown(options=LOCALIZERS.names(), value=localizer, description="localizer")
        self.metric: Any = widgets.Dropdown(options=self._metrics(), description="metric")
        self.component: Any = widgets.Combobox(
            options=[str(c) for c in components], value=str(components[0]), description="component",
            placeholder="m3, a5, a5.h2, m3.n117", continuous_update=False,
        )  # fmt: skip
        self.position: Any = widgets.Dropdown(options=(ALL_TOKENS,), description="token")
        buttons = {"style": {"button_width": "auto"}, "layout": {"width": "auto", "display": "flex"}}
        self.how: Any = widgets.ToggleButtons(options=_HOWS, tooltips=_HOW_TIPS, description="becomes", **buttons)
        self.run: Any = widgets.ToggleButtons(options=RUNS, tooltips=_RUN_TIPS, description="in the run", **buttons)
        self.runs = widgets.HTML()
        half = {"flex": "1 1 340px", "min_width": "0", "overflow": "hidden"}
        self.map = LiveFigure(with_plotly=True, on_click=self.click, layout={"overflow": "hidden"})
        self.answers, self.changed = LiveFigure(layout=half), LiveFigure(layout=half)
        super().__init__([
            widgets.HBox([self.fact, self.view], layout=_WRAPS),
            widgets.HBox([self.localizer, self.metric], layout=_WRAPS),
            self.runs, self.map,
            widgets.HBox([self.component, self.position, self.how, self.run], layout=_WRAPS),
            widgets.HBox([self.answers, self.changed], layout=_WRAPS),
        ])  # fmt: skip
        self._asked: tuple[object, ...] = ()
        self._choose_fact()
        self.fact.observe(lambda _: self._choose_fact(), "value")
        self.view.observe(lambda _: self._show_map(), "value")
        self.localizer.observe(lambda _: self._choose_localizer(), "value")
        self.metric.observe(lambda _: self._show_scores(), "value")
        for control in (self.component, self.position, self.how, self.run):
            control.observe(lambda _: self._show_change(), "value")

    def _metrics(self) -> tuple[str, ...]:
        return self.exploration.metrics(self.localizer.value) or ("its own",)

    def _choose_localizer(self) -> None:
        before = self.metric.value
        self.metric.options = self._metrics()
        if self.metric.value == before:  # else its own observer shows the map
            self._show_scores()

    def _choose_fact(self) -> None:
        tokens = self.exploration.tokens(self.fact.value)
        self.position.options = [
            ALL_TOKENS,
            *((f"{i}: {token.strip() or repr(token)}", i) for i, token in enumerate(tokens)),
        ]
        runs = self.exploration.runs(self.fact.value)
        outcome = runs.outcome
        self.runs.value = html_card(
            f"{self.exploration.facts[self.fact.value].subject} (clean) and {runs.donor or 'random tokens'} (corrupt)",
            {
                "clean": "".join(runs.clean), "corrupt": "".join(runs.corrupt),
                "logit difference": f"{outcome.logit_diff_before:+.2f} clean, {outcome.logit_diff_after:+.2f} corrupt",
            },
        )  # fmt: skip
        self.answers.show(_bars(outcome, ("clean run", "corrupt run"), "the two runs"))
        self._show_change()
        if self.view.value not in OF_ALL_FACTS or not self.map.figure:
            self._show_map()

    def _show_scores(self) -> None:
        """Show the localizer's scores, on the prompt's map if the map that is picked has none."""
        if self.view.value in ("this prompt, exact", "logit lens"):
            self.view.value = "this prompt"
        else:
            self._show_map()

    def _show_map(self) -> None:
        _try(self.map, self.views[self.view.value])

    def _show_change(self) -> None:
        fact, component, how, position, run = asked = tuple(
            control.value for control in (self.fact, self.component, self.how, self.position, self.run)
        )
        if asked == self._asked:  # a click changes two controls at once
            return
        self._asked = asked

        def changed() -> go.Figure:
            at = None if position == ALL_TOKENS[1] else position
            outcome = self.exploration.intervene(fact, Component.parse(component.strip()), how, at, run=run)
            where = self.position.label if at is None else f"token {self.position.label}"
            moved = f"logit difference {outcome.logit_diff_before:+.2f} → {outcome.logit_diff_after:+.2f}"
            return _bars(outcome, (f"{run} run", "changed"), f"{component} ({self.how.label}) at {where}; {moved}")

        _try(self.changed, changed)

    def click(self, component: str, column: int) -> None:
        """Choose the component that was clicked, and what its column is: a fact, or a token (the last of a role)."""
        token: int | None = column
        if self.view.value == "fact by fact":
            self.fact.value, token = column, None
        elif self.view.value == "all facts":
            scores = self._scores()
            whole = Component.parse(component).kind == "head"  # heads are columns themselves
            token = None if whole else self.exploration.token_of(self.fact.value, scores.roles[column])
        with self.component.hold_trait_notifications(), self.position.hold_trait_notifications():
            self.position.value = ALL_TOKENS[1] if token is None else token
            self.component.value = component

    def _scores(self) -> ComponentScores:
        metric = self.metric.value if self.exploration.metrics(self.localizer.value) else None
        return self.exploration.scores(self.localizer.value, metric)

    def _by_token(self) -> go.Figure:
        scores, fact = self._scores(), self.fact.value
        values = self.exploration.token_scores(fact, scores)
        figure = figures.layer_by_token(values, self.exploration.tokens(fact), scores.components, metric=scores.metric)
        what = f"{scores.sign}; scored by role, a role's tokens share its score evenly"
        return _titled(figure, f"{scores.method}: this prompt", what)

    def _patching(self) -> go.Figure:
        found = self.exploration.patching(self.fact.value)
        figure = figures.layer_by_token(found.values, found.tokens, found.components, metric="share restored")
        what = "share of the logit difference that returns in the corrupt run"
        return _titled(figure, "Exact patching: this prompt", what)

    def _all_facts(self) -> go.Figure:
        scores = self._scores()
        heads = all(component.kind == "head" for component in scores.components)
        return (figures.layer_by_head if heads else figures.component_by_role)(scores, facts=self.exploration.facts)


def _try(area: LiveFigure, make: Callable[[], go.Figure]) -> None:
    """Show the figure, or in one line why there is none."""
    area.note = "<i>computing …</i>"
    figure, why = None, "an error that JupyterLab's log (View, Show Log Console) tells"
    try:
        figure = make()
    except (ValueError, NotSupported) as error:
        why = str(error)
    finally:
        area.show(figure)
        area.note = "" if figure is not None else html_card("nothing to show", {"why": why})


def _titled(figure: go.Figure, title: str, subtitle: str) -> go.Figure:
    return styled(figure, title, label(subtitle), height=figure.layout.height)


def _bars(outcome: Outcome, names: tuple[str, str], subtitle: str) -> go.Figure:
    figure = figures.answers(outcome.before, outcome.after, true=outcome.true, names=names, subtitle=subtitle)
    figure.update_traces(texttemplate="%{x:.3f}", textposition="outside", textfont_size=10)
    return figure.update_xaxes(range=[0, 1.15])  # the number of a sure answer needs room
