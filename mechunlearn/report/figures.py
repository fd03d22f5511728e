"""All pictures under one name: every function takes data and returns a plotly Figure in one theme."""

from mechunlearn.report.check import check_figure, sweep_figure, training_figure
from mechunlearn.report.curves import probe_by_layer, probe_curve, relearning_curves
from mechunlearn.report.maps import (
    component_by_role,
    layer_by_head,
    layer_by_token,
    localizer_agreement,
    localizer_profiles,
)
from mechunlearn.report.outcomes import damage, shares, weight_changes

__all__ = [
    "check_figure", "component_by_role", "damage", "layer_by_head", "layer_by_token", "localizer_agreement",
    "localizer_profiles", "probe_by_layer", "probe_curve", "relearning_curves", "shares", "sweep_figure",
    "training_figure", "weight_changes",
]  # fmt: skip
