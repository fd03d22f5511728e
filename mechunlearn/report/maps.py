"""What localizers found, over layers, token roles, heads and facts.

Every function takes data and returns a plotly Figure in one theme.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.report import theme
from mechunlearn.report.heatmaps import diverging, first_prompt, hover_text, margin_of, sign_line, signed
from mechunlearn.report.theme import label, styled

SUBLAYERS = {"mlp": "MLPs", "attention": "attention"}


def component_by_role(
    scores: ComponentScores, *, limit: float | None = None, facts: Sequence[Fact] | None = None
) -> go.Figure:
    """Heat map of the score of every layer at every role of token, MLPs and attention side by side.

    Sign and units: those of the scores; both panels share one scale, symmetric about zero.

    Args:
        limit: end of the colour scale, to compare figures; the largest absolute score if not given.
        facts: those that were scored; hovering then tells a prompt.

    Raises:
        ValueError: the scores hold neither MLPs nor attention sublayers, or are of other facts.
    """
    kinds = [kind for kind in SUBLAYERS if any(c.kind == kind for c in scores.components)]
    if not kinds:
        raise ValueError(f"component_by_role: scores of '{scores.method}' hold no MLPs or attention; use layer_by_head")
    limit = limit or float(np.abs(scores.by_role).max()) or 1.0
    margins, prompt = margin_of(scores.per_fact), first_prompt(scores, facts)
    figure = make_subplots(
        1, len(kinds), subplot_titles=[SUBLAYERS[kind] for kind in kinds], shared_yaxes=True, horizontal_spacing=0.06
    )
    layers = sorted({c.layer for c in scores.components})
    for column, kind in enumerate(kinds, start=1):
        at = {c.layer: i for i, c in enumerate(scores.components) if c.kind == kind}
        present = [layer for layer in layers if layer in at]
        rows = [at[layer] for layer in present]
        hover = [
            [
                hover_text(
                    label(f"{scores.components[i]}, {role}"),
                    scores.metric,
                    scores.by_role[i, j],
                    margins[i, j],
                    scores.n_facts,
                    prompt,
                )
                for j, role in enumerate(scores.roles)
            ]
            for i in rows
        ]
        names = [[str(scores.components[i])] * len(scores.roles) for i in rows]
        roles = [theme.ROLE_LABELS.get(role, label(role)) for role in scores.roles]
        figure.add_trace(signed(scores.by_role[rows], roles, present, hover, components=names), row=1, col=column)
    figure.update_xaxes(tickangle=-40)
    figure.update_yaxes(dtick=max(1, len(layers) // 12), showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", row=1, col=1)
    diverging(figure, limit, scores.metric)
    title = f"{label(scores.method)}: score by layer and token"
    return styled(figure, title, sign_line(scores), height=190 + max(20 * len(layers), 220))


def layer_by_head(scores: ComponentScores, *, facts: Sequence[Fact] | None = None) -> go.Figure:
    """Heat map of the score of every attention head, summed over token roles; zero is white.

    Args:
        facts: those that were scored; hovering then tells a prompt.

    Raises:
        ValueError: the scores hold no heads, or are of other facts.
    """
    at = {(c.layer, c.index): i for i, c in enumerate(scores.components) if c.kind == "head"}
    if not at:
        raise ValueError(f"layer_by_head: scores of '{scores.method}' hold no heads; use component_by_role")
    layers, heads = sorted({layer for layer, _ in at}), sorted({index or 0 for _, index in at})
    margins, prompt = margin_of(scores.per_fact.sum(axis=2)), first_prompt(scores, facts)
    values = np.full((len(layers), len(heads)), np.nan)
    hover = [["" for _ in heads] for _ in layers]
    for (layer, index), i in at.items():
        row, column = layers.index(layer), heads.index(index or 0)
        values[row, column] = scores.values[i]
        hover[row][column] = hover_text(
            str(scores.components[i]), scores.metric, scores.values[i], margins[i], scores.n_facts, prompt
        )
    limit = float(np.nanmax(np.abs(values))) or 1.0
    names = [[f"a{layer}.h{head}" for head in heads] for layer in layers]
    figure = go.Figure(signed(values, heads, layers, hover, components=names))
    figure.update_xaxes(title="head", dtick=max(1, len(heads) // 16), showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", dtick=max(1, len(layers) // 12), showgrid=False, zeroline=False)
    diverging(figure, limit, scores.metric)
    height = 190 + max(20 * len(layers), 220)
    return styled(figure, f"{label(scores.method)}: score by head", sign_line(scores), height=height)


def component_by_fact(scores: ComponentScores, facts: Sequence[Fact], *, most: int = 32) -> go.Figure:
    """Heat map of every fact's own scores, summed over token roles: is it one place for all facts, or one for each?

    Args:
        facts: those that were scored, in their order.
        most: how many components are shown: those of the largest mean size, in the order of the scores. Colours end at
            the size that 98% of the cells stay below.

    Raises:
        ValueError: other facts than were scored.
    """
    if len(facts) != scores.n_facts:
        raise ValueError(f"component_by_fact: got {len(facts)} facts, allowed: the {scores.n_facts} that were scored")
    values = scores.per_fact.sum(axis=2).T
    rows = np.sort(np.argsort(-scores.reduced("mean_of_abs"), kind="stable")[:most])
    asked = [f"{label(fact.ask(fact.prompt))} → {label(fact.target_true)}" for fact in facts]
    hover = [
        [hover_text(str(scores.components[i]), scores.metric, values[i, j], np.nan, 1, text)
         for j, text in enumerate(asked)]
        for i in rows
    ]  # fmt: skip
    names = [str(scores.components[i]) for i in rows]
    cells = [[name] * len(facts) for name in names]
    figure = go.Figure(signed(values[rows], range(len(facts)), names, hover, components=cells))
    named = len(facts) <= 24
    figure.update_xaxes(
        title=None if named else "fact", showgrid=False, zeroline=False, tickangle=45 if named else 0,
        tickmode="array" if named else "auto", tickvals=list(range(len(facts))) if named else None,
        ticktext=[_short(fact.subject) for fact in facts] if named else None,
    )  # fmt: skip
    figure.update_yaxes(type="category", showgrid=False, dtick=max(1, -(-len(rows) // 32)))
    sizes = np.abs(values[rows])
    limit = float(np.quantile(sizes, 0.98)) or float(sizes.max())  # one odd fact would leave all others white
    diverging(figure, limit, scores.metric)
    left_out = f"; {len(rows)} of {len(values)} components" if len(rows) < len(values) else ""
    title = f"{label(scores.method)}: score by component and fact"
    return styled(figure, title, sign_line(scores) + left_out, height=230 + max(16 * len(rows), 200))


def _short(text: str, most: int = 24) -> str:
    return label(text if len(text) <= most else f"{text[: most - 1]}…")
