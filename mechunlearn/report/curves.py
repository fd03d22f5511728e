"""Curves: what a probe or a lens reads by layer, and what relearning brings back by step.

Every function takes data and returns a plotly Figure in one theme. A cell holds several results of an attack, one a
seed and hidden part: curves are means over all of them, each fact averaged over seeds first.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.attack.results import AttackResult
from mechunlearn.report import theme
from mechunlearn.report.numbers import null_name, results_of
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
    """P(true | candidates) step by step while the attacker trains, on the edited model and on its null.

    Left the hidden facts, with 95% intervals over facts and a star at each checkpoint that counts; with several
    results each is a thin line, and the bold one is their mean, up to the step that all of them reach. Right the dev
    facts of the first result, on which the attacker chooses among its settings (the chosen one bold).

    Raises:
        ValueError: the cell was not attacked so.
    """
    groups = _results(cell, attack)
    has_dev = any(isinstance(results[0].notes.get("dev_p_true"), Mapping) for _, _, results in groups)
    n_results = max(len(results) for _, _, results in groups)
    titles = ["hidden facts", "dev facts" if n_results == 1 else f"dev facts, first of {n_results} results"]
    figure = make_subplots(
        1, 1 + has_dev, subplot_titles=titles[: 1 + has_dev], shared_yaxes=True, horizontal_spacing=0.05
    )
    for name, colour, results in groups:
        tables, alone = [_by_step(result) for result in results], len(results) == 1
        for result, table in zip(results, tables, strict=True):
            where = f"{name}, {_which(result)}{label(result.chosen)}"
            if not alone:
                means = {int(step): _point(table[step].mean()) for step in table}
                line = _curve(means, name, where, colour, bold=False, errors=False)
                figure.add_trace(line.update(showlegend=False, legendgroup=name), row=1, col=1)
            if result.chosen_step in table:
                figure.add_trace(
                    _star(table[result.chosen_step], result.chosen_step, name, where, colour, 17 if alone else 11),
                    row=1,
                    col=1,
                )
        line = _curve(_mean_curve(tables), name, f"{name}, {_chosen(results)}", colour, bold=True, errors=True)
        figure.add_trace(line.update(showlegend=True, legendgroup=name), row=1, col=1)
        curves = results[0].notes.get("dev_p_true")
        for setting, points in curves.items() if isinstance(curves, Mapping) else ():
            means = {int(step): _point(v) for step, v in points}
            bold = setting == results[0].chosen
            line = _curve(means, name, f"{name}, {label(setting)}", colour, bold=bold, errors=False)
            figure.add_trace(line.update(showlegend=False, legendgroup=name), row=1, col=2)
    figure.update_xaxes(title="step")
    figure.update_yaxes(range=[0, 1.03])
    figure.update_yaxes(title="P(true | candidates)", row=1, col=1)
    return styled(
        figure, f"{label(cell.name)}: {label(attack)}", f"{label(cell.verdict)}; chosen: {_chosen(groups[0][2])}",
        height=400,
    )  # fmt: skip


def _by_step(result: AttackResult) -> Any:
    """P(true) of the hidden facts under the chosen setting: a frame with a row a fact and a column a step."""
    rows = result.rows
    rows = rows.loc[(rows["part"] == "forget_hidden") & (rows["setting"] == result.chosen)]
    return rows.pivot_table(index=["subject", "relation", "answer"], columns="step", values="p_true")


def _mean_curve(tables: Sequence[Any]) -> dict[int, Interval]:
    """Mean over the facts of all `_by_step` tables at each step that one has and all reach; straight lines between."""
    last = min(int(table.columns.max()) for table in tables)
    steps = sorted({int(step) for table in tables for step in table.columns if step <= last})
    drawn = [
        pd.DataFrame([np.interp(steps, table.columns, row) for row in table.to_numpy()], table.index, pd.Index(steps))
        for table in tables
    ]
    by_fact: Any = pd.concat(drawn).groupby(level=[0, 1, 2], sort=False).mean()
    return {step: _mean(by_fact[step]) for step in steps}


def _star(values: Iterable[float], step: int, name: str, where: str, colour: str, size: int) -> go.Scatter:
    at = _mean(values)
    return go.Scatter(
        x=[step],
        y=[at.value],
        mode="markers",
        showlegend=False,
        legendgroup=name,
        marker={"symbol": "star", "size": size, "color": colour, "line": {"color": "white", "width": 1}},
        hovertext=f"{where}<br>what counts: step {step}<br>{interval_words(at)}",
        hoverinfo="text",
    )


def _which(result: AttackResult) -> str:
    return f"seed {result.seed}, hidden part {result.fold}: "


def _chosen(results: Sequence[AttackResult]) -> str:
    """What the results chose, and how many of them if they differ."""
    counts = Counter(f"{label(r.chosen)}, step {r.chosen_step}" for r in results)
    if len(counts) == 1:
        return next(iter(counts)) + (f" (all {len(results)} results)" if len(results) > 1 else "")
    (setting, n), *others = counts.most_common()
    return f"{setting} ({n} of {len(results)} results) and {len(others)} other{'s' if len(others) > 1 else ''}"


def probe_by_layer(cell: Cell, *, attack: str = "probing") -> go.Figure:
    """P(true | candidates) of the hidden facts read layer by layer, on the edited model and on its null.

    Args:
        attack: "probing", or "logit_lens" (whose attention and MLP writes are shown on a click in the legend).

    Raises:
        ValueError: the cell was not attacked so, or the rows name no layers.
    """
    figure = go.Figure()
    lens = attack == "logit_lens"
    trained_on: dict[str, None] = {}
    for name, colour, results in _results(cell, attack):
        dashes = cycle(("solid", "dash", "dot", "dashdot", "longdash", "longdashdot"))
        for (place, means), dash in zip(_by_layer(results, lens=lens).items(), dashes, strict=False):
            line = _curve(means, f"{name}, {label(place)}", f"{name}, {label(place)}", colour,
                          bold=dash == "solid", errors=True)  # fmt: skip
            visible = "legendonly" if lens and not place.startswith("block") else True
            figure.add_trace(line.update(line={"dash": dash}, opacity=1, visible=visible))
        trained_on |= dict.fromkeys(result.chosen.partition(" ")[0] for result in results)
    if not figure.data:
        raise ValueError(
            f"probe_by_layer: the rows of '{attack}' on '{cell.name}' name no layers; run the attack 'probing' "
            "or 'logit_lens'"
        )
    figure.update_xaxes(title="blocks passed")
    figure.update_yaxes(title="P(true | candidates)", range=[0, 1.03])
    how = "final norm and unembedding" if lens else f"probes trained on {label(' / '.join(trained_on))}"
    return styled(figure, f"{label(cell.name)}: {label(attack)}", f"hidden facts; {how}", height=460 if lens else 400)


def _by_layer(results: Sequence[AttackResult], *, lens: bool) -> dict[str, dict[int, Interval]]:
    """By place (a site; with `lens` also the stream) and layer, the mean over the hidden facts of all results.

    Results may have chosen other training facts for their probes: each counts with what it chose.
    """
    frames: list[Any] = []
    for result in results:
        rows: Any = result.rows.loc[result.rows["part"] == "forget_hidden"].reset_index(drop=True)
        read = rows["setting"].str.extract(r"^(?P<source>\S+) ?(?P<site>.*?) ?\blayer (?P<layer>\d+)$").dropna()
        place = read["source"] + " " + read["site"] if lens else read["site"].where(read["site"] != "", read["source"])
        own = lens | (read["source"] == result.chosen.partition(" ")[0])
        frames.append(
            rows.join(read.assign(place=place.str.strip(), layer=read["layer"].astype(int))[own], how="inner")
        )
    by_fact: Any = (
        pd.concat(frames).groupby(["place", "layer", "subject", "relation", "answer"], sort=False)["p_true"].mean()
    )
    found: dict[str, dict[int, Interval]] = {}
    for (place, layer), values in by_fact.groupby(level=["place", "layer"], sort=False):
        found.setdefault(str(place), {})[int(layer)] = _mean(values)
    return found


def _results(cell: Cell, attack: str) -> list[tuple[str, str, list[AttackResult]]]:
    """(name, colour, results) of the attack on the model in question and, if there are any, on its null."""
    found = [
        ("this model", theme.EDITED, results_of(cell.edited, attack)),
        (null_name(cell), theme.TWIN, results_of(cell.null, attack)),
    ]
    if not any(results for _, _, results in found):
        known = ", ".join(dict.fromkeys(r.attack for r in cell.edited)) or "none"
        raise ValueError(f"cell '{cell.name}': no attack {attack!r}; attacks: {known}")
    return [one for one in found if one[2]]


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


def _point(value: float) -> Interval:
    return Interval(value=value, lower=np.nan, upper=np.nan, n=0)


def _mean(p_true: Iterable[float]) -> Interval:
    return mean_interval(list(p_true), draws=400)  # to draw, not to decide by
