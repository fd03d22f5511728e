"""Where an answer can be read: probe accuracy, or code length, by layer and position."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from mechunlearn.components import ComponentScores
from mechunlearn.report import theme
from mechunlearn.report.heatmaps import colour_bar
from mechunlearn.report.theme import label, styled

_READABLE = {"curve": "accuracy", "code": "compression"}
_TITLES = {"accuracy": "accuracy, unseen subjects", "compression": "saved share of the code length"}


def probe_by_position(scores: Mapping[str, ComponentScores]) -> go.Figure:
    """Heat map of what a probe reads by layer and position; the baselines are in the hover.

    Units: accuracy on unseen subjects, or the share of the answers' code length that is saved (at most 1; below 0 the
        probe costs more than it reads).

    Args:
        scores: by position (a column each), those of `fact_lookup_probe`, all by accuracy or all by compression.

    Raises:
        ValueError: no scores, scores without a probe's curve, of both kinds, or of different layers.
    """
    if not scores:
        raise ValueError("probe_by_position: got no scores, allowed: at least one of fact_lookup_probe")
    kinds = {name: _kind(name, one) for name, one in scores.items()}
    (kind, *others), streams = dict.fromkeys(kinds.values()), {one.components for one in scores.values()}
    if others or len(streams) > 1:
        raise ValueError("probe_by_position: got probes of several kinds or layers, allowed: one kind, one model")
    measure = _READABLE[kind]
    rows = ["embed", *map(str, next(iter(streams)))]
    z = np.array([one.notes[kind][measure] for one in scores.values()], dtype=float).T
    if len(z) != len(rows):
        raise ValueError(f"probe_by_position: got {len(z)} streams, allowed: {len(rows)}, one before all components")
    names = [theme.ROLE_LABELS.get(name, label(name)) for name in scores]
    hover = [
        [f"<b>after {row}</b>, {name}<br>{measure} {z[i, j]:.3f}{_baselines(one, kind, i)}<br>n = {one.n_facts} facts"
         for j, (name, one) in enumerate(zip(names, scores.values(), strict=True))]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=z, x=names, y=rows, text=hover, hoverinfo="text", xgap=1, ygap=1, zmin=min(0.0, float(z.min())), zmax=1,
            colorscale=theme.SEQUENTIAL, colorbar=colour_bar(_TITLES[measure]),
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, title="stream after", dtick=max(1, len(rows) // 24))
    baseline = max(max(one.notes[kind].get("baseline", [np.nan])) for one in scores.values())
    subtitle = f"best baseline: at most {baseline:.2f}" if np.isfinite(baseline) else ""
    return styled(figure, "Where the answer can be read", subtitle, height=200 + max(20 * min(len(rows), 32), 220))


def _kind(name: str, scores: ComponentScores) -> str:
    found = next((k for k, measure in _READABLE.items() if measure in (scores.notes.get(k) or {})), None)
    if found is None:
        raise ValueError(
            f"probe_by_position: scores at '{name}' hold no probe's curve; give those of fact_lookup_probe"
        )
    return found


def _baselines(scores: ComponentScores, kind: str, stream: int) -> str:
    curves = scores.notes[kind]
    shown = {"baseline": "best baseline", "control": "shuffled answers", "twin": "twin that never knew"}
    return "".join(f"<br>{text} {curves[key][stream]:.3f}" for key, text in shown.items() if key in curves)
