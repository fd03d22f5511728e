"""All pictures under one name: every function takes data and returns a plotly Figure in one theme."""

from mechunlearn.report.agreements import localizer_agreement, localizer_profiles, rank_correlations
from mechunlearn.report.answers import answers
from mechunlearn.report.before_after import before_after, maps_before_after
from mechunlearn.report.check import check_figure, sweep_figure, training_figure
from mechunlearn.report.circuits import circuit, faithfulness_curves
from mechunlearn.report.curves import probe_by_layer, probe_curve, relearning_curves
from mechunlearn.report.maps import component_by_fact, component_by_role, layer_by_head
from mechunlearn.report.outcomes import damage, shares, weight_changes
from mechunlearn.report.pictures import save_png
from mechunlearn.report.probe_maps import probe_by_position
from mechunlearn.report.tokens import layer_by_token, lens_by_token

__all__ = [
    "answers", "before_after", "check_figure", "circuit", "component_by_fact", "component_by_role", "damage",
    "faithfulness_curves", "layer_by_head", "layer_by_token", "lens_by_token", "localizer_agreement",
    "localizer_profiles", "maps_before_after", "probe_by_layer", "probe_by_position", "probe_curve",
    "rank_correlations", "relearning_curves", "save_png", "shares", "sweep_figure", "training_figure", "weight_changes",
]  # fmt: skip
