"""Pictures of scores, attacks and runs: every function takes data and returns a plotly Figure in one theme."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mechunlearn.attack.results import AttackResult
from mechunlearn.components import Component, ComponentScores
from mechunlearn.report import theme
from mechunlearn.report.tables import measured
from mechunlearn.report.theme import label, styled
from mechunlearn.runs import Cell, Run
from mechunlearn.statistics import Interval, mean_interval

SUBLAYERS = {"mlp": "MLPs", "attention": "attention"}


def component_by_role(scores: ComponentScores, *, limit: float | None = None) -> go.Figure:
    """Heat map of the score of every layer at every role of token, MLPs and attention side by side.

    Sign and units: those of the scores; both panels share one scale, symmetric about zero.

    Args:
        limit: end of the colour scale, to compare figures; the largest absolute score if not given.

    Raises:
        ValueError: the scores hold neither MLPs nor attention sublayers.
    """
    kinds = [kind for kind in SUBLAYERS if any(c.kind == kind for c in scores.components)]
    if not kinds:
        raise ValueError(f"component_by_role: scores of '{scores.method}' hold no MLPs or attention; use layer_by_head")
    limit = limit or float(np.abs(scores.by_role).max()) or 1.0
    errors = _standard_error(scores.per_fact)
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
                _hover(
                    label(f"{scores.components[i]}, {role}"),
                    scores.metric,
                    scores.by_role[i, j],
                    errors[i, j],
                    scores.n_facts,
                )
                for j, role in enumerate(scores.roles)
            ]
            for i in rows
        ]
        roles = [theme.ROLE_LABELS.get(role, label(role)) for role in scores.roles]
        figure.add_trace(_signed(scores.by_role[rows], roles, present, hover), row=1, col=column)
    figure.update_xaxes(tickangle=-40)
    figure.update_yaxes(dtick=max(1, len(layers) // 12), showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", row=1, col=1)
    _diverging(figure, limit, scores.metric)
    title = f"{label(scores.method)}: score by layer and token"
    return styled(figure, title, _sign_line(scores), height=190 + max(20 * len(layers), 220))


def layer_by_head(scores: ComponentScores) -> go.Figure:
    """Heat map of the score of every attention head, summed over token roles; zero is white.

    Raises:
        ValueError: the scores hold no heads.
    """
    at = {(c.layer, c.index): i for i, c in enumerate(scores.components) if c.kind == "head"}
    if not at:
        raise ValueError(f"layer_by_head: scores of '{scores.method}' hold no heads; use component_by_role")
    layers, heads = sorted({layer for layer, _ in at}), sorted({index or 0 for _, index in at})
    values = np.full((len(layers), len(heads)), np.nan)
    hover = [["" for _ in heads] for _ in layers]
    for (layer, index), i in at.items():
        row, column = layers.index(layer), heads.index(index or 0)
        values[row, column] = scores.values[i]
        hover[row][column] = _hover(
            str(scores.components[i]), scores.metric, scores.values[i], scores.standard_error[i], scores.n_facts
        )
    limit = float(np.nanmax(np.abs(values))) or 1.0
    figure = go.Figure(_signed(values, heads, layers, hover))
    figure.update_xaxes(title="head", dtick=max(1, len(heads) // 16), showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", dtick=max(1, len(layers) // 12), showgrid=False, zeroline=False)
    _diverging(figure, limit, scores.metric)
    height = 190 + max(20 * len(layers), 220)
    return styled(figure, f"{label(scores.method)}: score by head", _sign_line(scores), height=height)


def layer_by_token(
    values: Float[np.ndarray, "component token"],
    tokens: Sequence[str],
    components: Sequence[Component],
    *,
    metric: str = "score",
) -> go.Figure:
    """Heat map of one prompt: what each component does at each token; zero is white.

    Args:
        tokens: as the tokenizer gives them; escaped, and told apart where they repeat.
        components: the rows from bottom to top.

    Raises:
        ValueError: values of another shape than components x tokens.
    """
    if values.shape != (len(components), len(tokens)):
        raise ValueError(f"layer_by_token: got values {values.shape}, allowed: ({len(components)}, {len(tokens)})")
    names, labels = [str(c) for c in components], theme.token_labels(tokens)
    hover = [
        [f"<b>{name}</b> at token {j}: {text}<br>{label(metric)} {values[i, j]:+.3f}" for j, text in enumerate(labels)]
        for i, name in enumerate(names)
    ]
    figure = go.Figure(_signed(values, labels, names, hover))
    figure.update_xaxes(type="category", tickangle=-45 if len(tokens) > 8 else 0, showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    _diverging(figure, float(np.abs(values).max()), metric)
    return styled(figure, "One prompt, token by token", height=200 + max(20 * len(names), 200))


def localizer_profiles(run: Run) -> go.Figure:
    """Where the localizers point: one row a localizer, each scaled by its largest absolute score; dots were edited.

    Heads and neurons are summed within their sublayer; localizers that score everything alike are left out.

    Raises:
        ValueError: no localizer tells components apart.
    """
    shown = {name: scores for name, scores in run.scores.items() if np.ptp(scores.values) > 0}
    if not shown:
        raise ValueError("localizer_profiles: no localizer tells components apart; run one that is not a control")
    profiles = {name: _by_sublayer(scores) for name, scores in shown.items()}
    kinds = [kind for kind in SUBLAYERS if any(kind == k for profile in profiles.values() for k, _ in profile)]
    figure = make_subplots(len(kinds), 1, subplot_titles=[SUBLAYERS[kind] for kind in kinds], vertical_spacing=0.25)
    names = list(reversed(profiles))
    for row, kind in enumerate(kinds, start=1):
        layers = sorted({layer for profile in profiles.values() for k, layer in profile if k == kind})
        z, hover = np.full((len(names), len(layers)), np.nan), [[""] * len(layers) for _ in names]
        for i, name in enumerate(names):
            largest = max(abs(value) for value, _ in profiles[name].values()) or 1.0
            for j, layer in enumerate(layers):
                if (kind, layer) not in profiles[name]:
                    continue
                value, error = profiles[name][kind, layer]
                z[i, j] = value / largest
                where = f"{label(name)}: {kind[0]}{layer}"
                hover[i][j] = _hover(where, shown[name].metric, value, error, shown[name].n_facts)
        x = [f"{kind[0]}{layer}" for layer in layers]
        figure.add_trace(_signed(z, x, [label(name) for name in names], hover), row=row, col=1)
        edited = [
            (label(c.localizer), text) for c in run.cells if c.localizer in shown for text in c.components if text in x
        ]
        if edited:
            marks = go.Scatter(
                x=[text for _, text in edited],
                y=[name for name, _ in edited],
                mode="markers",
                showlegend=False,
                marker={"size": 9, "color": "white", "line": {"color": theme.INK, "width": 2}},
                hoverinfo="skip",
            )
            figure.add_trace(marks, row=row, col=1)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    _diverging(figure, 1.0, "share of its largest")
    subtitle = "each row scaled by its largest absolute score; white dots: edited"
    return styled(figure, "Where the localizers point", subtitle, height=130 + len(kinds) * (70 + 34 * len(names)))


def localizer_agreement(run: Run) -> go.Figure:
    """How well each pair of localizers agrees: rank correlation, correlation, and overlap of the highest components.

    Raises:
        ValueError: nothing was compared.
    """
    frame = run.agreement
    if frame.empty:
        raise ValueError("localizer_agreement: no two localizers were compared; run at least two")
    pairs = [f"{label(a)}<br>against {label(b)}" for a, b in zip(frame["a"], frame["b"], strict=True)]
    measures = {"spearman": "Spearman", "pearson": "Pearson", "top_k_recall": "share of the top components in common"}
    n = [f", n = {int(v)} components" for v in frame["n_components"]] if "n_components" in frame else [""] * len(frame)
    figure = go.Figure()
    for (column, name), colour, symbol in zip(measures.items(), theme.PALETTE, theme.SYMBOLS, strict=False):
        if column in frame:
            figure.add_trace(
                go.Scatter(
                    x=frame[column],
                    y=pairs,
                    mode="markers",
                    name=name,
                    marker={"size": 14, "color": colour, "symbol": symbol},
                    hovertext=[f"{name} {value:.2f}{text}" for value, text in zip(frame[column], n, strict=True)],
                    hoverinfo="text",
                )
            )
    least = float(np.nanmin([frame[column].min() for column in measures if column in frame] + [0.0]))
    figure.update_xaxes(range=[min(-0.05, least - 0.1), 1.05], zeroline=True, zerolinecolor=theme.QUIET)
    figure.update_yaxes(type="category", autorange="reversed")
    return styled(
        figure,
        "Do the localizers agree?",
        "1: the same order of components, 0: unrelated",
        height=190 + 56 * len(pairs),
    )


def probe_curve(notes: Mapping[str, Any]) -> go.Figure:
    """How well the answer can be read at the subject, layer by layer, beside its baselines; the lookup band is shaded.

    Args:
        notes: those of a `fact_lookup_probe` score: `curve` (accuracy, baseline, majority, bag, twin, control by
            layer, 0 = before the first block) and `band`.

    Raises:
        ValueError: the notes hold no curve.
    """
    curve = notes.get("curve")
    if not isinstance(curve, Mapping) or "accuracy" not in curve:
        raise ValueError("probe_curve: the notes hold no 'curve'; give the notes of fact_lookup_probe")
    lines = {
        "accuracy": ("this model", theme.EDITED, "solid", 4),
        "twin": ("twin that never knew", theme.TWIN, "solid", 3),
        "bag": ("name tokens alone", theme.ORIGINAL, "dash", 2.5),
        "majority": ("most frequent answer", theme.OTHER, "dot", 2.5),
        "control": ("shuffled answers", theme.QUIET, "dashdot", 2.5),
    }
    figure = go.Figure()
    for key, (name, colour, dash, width) in lines.items():
        if curve.get(key) is not None:
            figure.add_trace(
                go.Scatter(
                    x=list(range(len(curve[key]))),
                    y=list(curve[key]),
                    name=name,
                    mode="lines+markers" if width > 2.5 else "lines",
                    line={"color": colour, "dash": dash, "width": width},
                    marker={"size": 8},
                    hovertemplate=f"{name}<br>after %{{x}} blocks: %{{y:.3f}}<extra></extra>",
                )
            )
    band, reason = notes.get("band"), str(notes.get("band_reason", ""))
    subtitle = f"no lookup band: {label(reason)}"
    if isinstance(band, Mapping):
        figure.add_vrect(x0=band["first"], x1=band["last"] + 1, fillcolor=theme.EDITED, opacity=0.12, line_width=0)
        subtitle = f"shaded: facts are looked up from m{band['first']} to m{band['last']}"
    figure.update_xaxes(title="blocks passed", dtick=max(1, len(curve["accuracy"]) // 16))
    figure.update_yaxes(title="accuracy, unseen subjects", range=[0, 1.03])
    return styled(figure, "Where the answer becomes readable at the subject", subtitle)


def relearning_curves(cell: Cell, *, attack: str = "relearning") -> go.Figure:
    """P(true | candidates) step by step while the attacker trains, on the edited model and on its twin.

    Left the hidden facts, with 95% intervals over facts and a star at the checkpoint that counts; right the dev facts,
    on which the attacker chooses among its settings (the chosen one bold).

    Raises:
        ValueError: the cell was not attacked so.
    """
    pairs = _results(cell, attack)
    has_dev = any(isinstance(result.notes.get("dev_p_true"), Mapping) for _, _, result in pairs)
    titles = ["hidden facts", "dev facts"]
    figure = make_subplots(
        1, 1 + has_dev, subplot_titles=titles[: 1 + has_dev], shared_yaxes=True, horizontal_spacing=0.05
    )
    for name, colour, result in pairs:
        rows = result.rows[result.rows["part"] == "forget_hidden"]
        for setting, group in rows.groupby("setting", sort=False):
            means = {int(str(step)): _mean(g["p_true"].to_numpy()) for step, g in group.groupby("step")}
            chosen = setting == result.chosen
            line = _curve(means, name, f"{name}, {label(setting)}", colour, bold=chosen, errors=chosen)
            figure.add_trace(line.update(showlegend=bool(chosen), legendgroup=name), row=1, col=1)
            if chosen and result.chosen_step in means:
                at = means[result.chosen_step]
                star = go.Scatter(
                    x=[result.chosen_step],
                    y=[at.value],
                    mode="markers",
                    showlegend=False,
                    legendgroup=name,
                    marker={"symbol": "star", "size": 17, "color": colour, "line": {"color": "white", "width": 1}},
                    hovertext=f"{name}, what counts:<br>{label(setting)}, step {result.chosen_step}<br>{_words(at)}",
                    hoverinfo="text",
                )
                figure.add_trace(star, row=1, col=1)
        curves = result.notes.get("dev_p_true")
        for setting, points in curves.items() if isinstance(curves, Mapping) else ():
            means = {int(step): Interval(value=v, lower=np.nan, upper=np.nan, n=0) for step, v in points}
            line = _curve(means, name, f"{name}, {label(setting)}", colour, bold=setting == result.chosen, errors=False)
            figure.add_trace(line.update(showlegend=False, legendgroup=name), row=1, col=2)
    figure.update_xaxes(title="step")
    figure.update_yaxes(range=[0, 1.03])
    figure.update_yaxes(title="P(true | candidates)", row=1, col=1)
    subtitle = f"{label(cell.verdict)}; chosen: {label(pairs[0][2].chosen)}, step {pairs[0][2].chosen_step}"
    return styled(figure, f"{label(cell.name)}: {label(attack)}", subtitle, height=400)


def probe_by_layer(cell: Cell, *, attack: str = "probing") -> go.Figure:
    """P(true | candidates) of the hidden facts read by probes, layer by layer, on the edited model and on its twin.

    Raises:
        ValueError: the cell was not probed, or the rows name no layers.
    """
    figure = go.Figure()
    trained_on: dict[str, None] = {}
    for name, colour, result in _results(cell, attack):
        lines: dict[str, dict[int, Interval]] = {}
        for setting, group in result.rows[result.rows["part"] == "forget_hidden"].groupby("setting", sort=False):
            if found := re.search(r"\blayer (\d+)", str(setting)):
                probe = str(setting).replace(found[0], "").strip()
                lines.setdefault(probe, {})[int(found[1])] = _mean(group["p_true"].to_numpy())
        for (probe, means), dash in zip(lines.items(), cycle(("solid", "dash", "dot")), strict=False):
            part, _, site = probe.partition(" ")
            trained_on[part] = None
            where = f"{name}, {label(site or part)}"
            line = _curve(means, where, f"{name}, {label(probe)}", colour, bold=dash == "solid", errors=True)
            figure.add_trace(line.update(line={"dash": dash}, opacity=1))
    if not figure.data:
        raise ValueError(
            f"probe_by_layer: the rows of '{attack}' on '{cell.name}' name no layers; run the attack 'probing'"
        )
    figure.update_xaxes(title="blocks passed")
    figure.update_yaxes(title="P(true | candidates)", range=[0, 1.03])
    subtitle = f"hidden facts; probes trained on {label(' / '.join(trained_on))}"
    return styled(figure, f"{label(cell.name)}: {label(attack)}", subtitle, height=400)


def shares(run: Run) -> go.Figure:
    """Forest plot of D, the share of the lost knowledge that each attack brings back, with its bounds.

    0 is a model that never knew, 1 the original; the dashed line is delta, the most that still counts as removed. Lower
    bounds hold for all attacks at once, upper ones for each. Open marks do not count: no power shown, or failed health.

    Raises:
        ValueError: no cell was attacked.
    """
    cells = [cell for cell in run.cells if cell.verdict.rows]
    if not cells:
        raise ValueError("shares: no cell has attacks to show; run at least one attack")
    attacks = list(dict.fromkeys(row.name for cell in cells for row in cell.verdict.rows))
    figure = go.Figure()
    for i, attack in enumerate(attacks):
        found = [(j, row) for j, cell in enumerate(cells) for row in cell.verdict.rows if row.name == attack]
        counts = [row.healthy and row.decides and (row.powered or row.zero_budget) for _, row in found]
        symbol, colour = theme.SYMBOLS[i % len(theme.SYMBOLS)], theme.PALETTE[i % len(theme.PALETTE)]
        figure.add_trace(
            go.Scatter(
                x=[row.share for _, row in found],
                y=[j + 0.6 * ((i + 0.5) / len(attacks) - 0.5) for j, _ in found],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "thickness": 2.5,
                    "width": 5,
                    "array": [max(row.upper - row.share, 0.0) for _, row in found],
                    "arrayminus": [max(row.share - row.lower, 0.0) for _, row in found],
                },
                mode="markers",
                name=label(attack),
                marker={
                    "size": 12,
                    "color": colour,
                    "symbol": [symbol if c else f"{symbol}-open" for c in counts],
                    "line": {"width": 2, "color": colour},
                },
                hovertext=[
                    f"<b>{label(cells[j].name)}</b>, {label(attack)}"
                    f"<br>D {row.share:.2f} [{row.lower:.2f}, {row.upper:.2f}]"
                    f"<br>n = {row.n_facts} facts, {row.n_seeds} seeds<br>{label(row.note)}"
                    for j, row in found
                ],
                hoverinfo="text",
            )
        )
    delta = cells[0].verdict.delta
    for x, text, dash in (
        (0.0, "never knew", "solid"),
        (delta, f"δ = {delta:.0%}", "dash"),
        (1.0, "original", "solid"),
    ):
        figure.add_vline(x=x, line={"color": theme.BAD if dash == "dash" else theme.QUIET, "dash": dash, "width": 2})
        place = (
            {"xanchor": "left", "x": x + 0.01, "font": {"color": theme.BAD}}
            if dash == "dash"
            else {"x": x, "xanchor": "right"}
        )
        figure.add_annotation(**place, y=1, yref="paper", yanchor="bottom", text=text, showarrow=False)
    bounds = [bound for cell in cells for row in cell.verdict.rows for bound in (row.lower, row.upper, row.share)]
    span = [max(min(*bounds, -0.15) - 0.05, -1.0), min(max(*bounds, 1.05) + 0.05, 2.0)]
    figure.update_xaxes(range=span, tickformat=".0%", title="recovered share D", zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(cells))),
        ticktext=[f"{label(c.name)}<br><i>{label(c.verdict)}</i>" for c in cells],
        range=[len(cells) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
    )
    subtitle = "0%: never knew, 100%: the original; open marks do not count"
    return styled(figure, "What the attacks bring back", subtitle, height=190 + 66 * len(cells))


def weight_changes(run: Run | Cell) -> go.Figure:
    """Heat map of how much each edited component changed: ||W' - W|| / ||W||, one row a cell.

    Raises:
        ValueError: nothing was edited.
    """
    cells = (run,) if isinstance(run, Cell) else run.cells
    frames = {
        cell.name: cell.weight_changes for cell in cells if cell.weight_changes is not None and len(cell.weight_changes)
    }
    if not frames:
        raise ValueError("weight_changes: no cell has a weight edit; run an arm")
    table = pd.DataFrame({name: frame.set_index("component")["relative_change"] for name, frame in frames.items()})
    parsed = sorted(
        (Component.parse(str(text)) for text in table.index),
        key=lambda c: (c.kind != "mlp", c.kind, c.layer, c.index or 0),
    )
    names, values = [str(c) for c in parsed], table.loc[[str(c) for c in parsed]].to_numpy().T
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            y=[label(name) for name in frames],
            colorscale=theme.SEQUENTIAL,
            zmin=0,
            zmax=float(np.nanmax(values)) or 1.0,
            xgap=2,
            ygap=2,
            texttemplate="%{z:.2f}" if len(names) <= 16 else None,
            hoverongaps=False,
            hovertemplate="%{y}<br><b>%{x}</b> changed by %{z:.3f} of its norm<extra></extra>",
            colorbar={"tickformat": ".2f"},
        )
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return styled(
        figure,
        "How far the weights moved",
        "norm of the change over the norm before, of each edited part",
        height=170 + 44 * len(frames),
    )


def damage(run: Run) -> go.Figure:
    """What was kept against what was forgotten, when just asked: accuracy with exact 95% bounds, one mark a cell.

    Top left is what one wants: forgotten facts gone, others as they were.

    Raises:
        ValueError: no cell was evaluated on forgotten and retained facts.
    """
    panels = {"retain_test": "facts about others", "same_subject": "other facts, same subjects"}
    measures = {
        (cell.name, part): measured(cell, part, "accuracy") for cell in run.cells for part in ("forget_hidden", *panels)
    }
    parts = [part for part in panels if any(measures[cell.name, part] for cell in run.cells)]
    if not parts or not any(measures[cell.name, "forget_hidden"] for cell in run.cells):
        raise ValueError("damage: no cell has accuracy on forget_hidden and on kept facts; evaluate these parts")
    figure = make_subplots(
        1, len(parts), subplot_titles=[panels[part] for part in parts], shared_yaxes=True, horizontal_spacing=0.05
    )
    styles = zip(theme.PALETTE * len(run.cells), cycle(theme.SYMBOLS), strict=False)
    for cell, (colour, symbol) in zip(run.cells, styles, strict=False):
        forgotten = measures[cell.name, "forget_hidden"]
        for column, part in enumerate(parts, start=1):
            kept = measures[cell.name, part]
            if forgotten is None or kept is None:
                continue
            figure.add_trace(
                go.Scatter(
                    x=[forgotten.value],
                    y=[kept.value],
                    mode="markers",
                    name=label(cell.name),
                    legendgroup=cell.name,
                    showlegend=column == 1,
                    error_x=_bars(forgotten),
                    error_y=_bars(kept),
                    marker={"size": 14, "color": colour, "symbol": symbol, "line": {"color": "white", "width": 1}},
                    hovertext=f"<b>{label(cell.name)}</b><br>forgotten: {_words(forgotten)}<br>kept: {_words(kept)}",
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(range=[-0.05, 1.05], title="accuracy, forgotten facts")
    figure.update_yaxes(range=[-0.05, 1.05])
    figure.update_yaxes(title="accuracy, kept facts", row=1, col=1)
    return styled(figure, "What was kept, what was forgotten", "when just asked; top left is best", height=460)


def _signed(z: np.ndarray, x: Sequence[Any], y: Sequence[Any], hover: Sequence[Sequence[str]]) -> go.Heatmap:
    return go.Heatmap(
        z=z,
        x=list(x),
        y=list(y),
        text=hover,
        hoverinfo="text",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        coloraxis="coloraxis",
    )


def _diverging(figure: go.Figure, limit: float, metric: str) -> None:
    """One colour scale for all panels, symmetric about zero."""
    limit = limit or 1.0
    bar = {"title": {"text": label(metric), "side": "right", "font": {"size": 14}}, "thickness": 16}
    figure.update_layout(coloraxis={"colorscale": theme.DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar})


def _hover(where: str, metric: str, value: float, error: float, n: int) -> str:
    spread = f" ± {error:.3f} (standard error)" if np.isfinite(error) else ""
    return f"<b>{where}</b><br>{label(metric)} {value:+.3f}{spread}<br>n = {n} facts"


def _standard_error(per_fact: np.ndarray) -> np.ndarray:
    n = len(per_fact)
    return per_fact.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full(per_fact.shape[1:], np.nan)


def _by_sublayer(scores: ComponentScores) -> dict[tuple[str, int], tuple[float, float]]:
    """Score and standard error of every sublayer; what lies inside it is summed, fact by fact."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for i, component in enumerate(scores.components):
        key = ("mlp" if component.kind in ("mlp", "neuron") else "attention", component.layer)
        found[key] = found.get(key, 0.0) + scores.per_fact[:, i].sum(axis=1)
    return {key: (float(v.mean()), float(_standard_error(v[:, None])[0])) for key, v in found.items()}


def _sign_line(scores: ComponentScores) -> str:
    return f"{label(scores.sign)}; n = {scores.n_facts} facts"


def _results(cell: Cell, attack: str) -> list[tuple[str, str, AttackResult]]:
    """(name, colour, result) of the attack on the model in question and, if there is one, on its twin."""
    found = [("this model", theme.EDITED, r) for r in cell.edited if r.attack == attack]
    found += [("twin", theme.TWIN, r) for r in cell.null if r.attack == attack]
    if not found:
        known = ", ".join(dict.fromkeys(r.attack for r in cell.edited)) or "none"
        raise ValueError(f"cell '{cell.name}': no attack {attack!r}; attacks: {known}")
    return found


def _curve(
    means: Mapping[int, Interval], name: str, where: str, colour: str, *, bold: bool, errors: bool
) -> go.Scatter:
    steps = sorted(means)
    bars = _bars(*(means[step] for step in steps)) if errors else None
    return go.Scatter(
        x=steps,
        y=[means[step].value for step in steps],
        name=name,
        mode="lines+markers",
        error_y=bars,
        line={"color": colour, "width": 3.5 if bold else 1.5},
        marker={"size": 7 if bold else 4},
        opacity=1 if bold else 0.5,
        hovertext=[f"{where}<br>at {step}: {_words(means[step])}" for step in steps],
        hoverinfo="text",
    )


def _mean(p_true: Iterable[float]) -> Interval:
    return mean_interval(list(p_true), draws=400)  # to draw, not to decide by


def _bars(*intervals: Interval) -> dict[str, Any]:
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


def _words(interval: Interval) -> str:
    if not np.isfinite(interval.lower):
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} [{interval.lower:.2f}, {interval.upper:.2f}], n = {interval.n}"
