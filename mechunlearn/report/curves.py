"""Curves: what a probe reads by layer, and what relearning brings back by step.

Every function takes data and returns a plotly Figure in one theme.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.attack.results import AttackResult
from mechunlearn.report import theme
from mechunlearn.report.theme import error_bars, interval_words, label, styled
from mechunlearn.runs import Cell
from mechunlearn.statistics import Interval, mean_interval


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
        rows = result.rows.query("part == 'forget_hidden'")
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
                    hovertext=f"{name}, what counts:<br>{label(setting)}, step {result.chosen_step}<br>"
                    f"{interval_words(at)}",
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
        for setting, group in result.rows.query("part == 'forget_hidden'").groupby("setting", sort=False):
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
    bars = error_bars(*(means[step] for step in steps)) if errors else None
    return go.Scatter(
        x=steps,
        y=[means[step].value for step in steps],
        name=name,
        mode="lines+markers",
        error_y=bars,
        line={"color": colour, "width": 3.5 if bold else 1.5},
        marker={"size": 7 if bold else 4},
        opacity=1 if bold else 0.5,
        hovertext=[f"{where}<br>at {step}: {interval_words(means[step])}" for step in steps],
        hoverinfo="text",
    )


def _mean(p_true: Iterable[float]) -> Interval:
    return mean_interval(list(p_true), draws=400)  # to draw, not to decide by
