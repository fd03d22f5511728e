"""What stands beside a localization: what exact patching says, and whether other subjects or words would say it."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize.activation_patching import activation_patching
from mechunlearn.localize.agreement import agreement
from mechunlearn.localize.stability import stability
from mechunlearn.models import Model

FIRST_ORDER = ("attribution_patching", "atp_star", "integrated_gradients", "relevance_patching")
"""Localizers that estimate what `activation_patching` measures."""
SHARED = ("pairs_per_fact", "donors", "seed")
"""Options that give both the same pairs."""


def with_stability(
    model: Model, facts: Sequence[Fact], scores: ComponentScores, localizer: Callable[..., ComponentScores],
    options: Mapping[str, Any], *, forms: int,
) -> ComponentScores:  # fmt: skip
    """The scores with a note `stability`: rank correlations over drawn subjects and over forms of the prompt.

    Args:
        facts: what was scored; scores that have no row a fact are given back as they are.
        forms: of the prompt, the prompt itself among them; each other one costs the localization again.
    """
    if len(facts) != scores.n_facts:
        return scores
    again = localizer if forms > 1 else None
    found = stability(facts, scores, again, model=model, options=options, max_forms=forms)
    return replace(scores, notes={**scores.notes, "stability": _finite(asdict(found))})


def with_agreement(
    model: Model, facts: Sequence[Fact], scores: ComponentScores, localizer: Callable[..., ComponentScores],
    options: Mapping[str, Any], *, max_facts: int = 32,
) -> ComponentScores:  # fmt: skip
    """The scores with a note `agreement`: with `activation_patching` of every component at all tokens at once.

    Both are taken on the same pairs of the same facts, drawn if there are more than `max_facts`. The form "both" is
    compared with the mean of denoising and noising, the sizes that AtP*'s dropped gradients give with sizes. Single
    neurons are too many to patch: where nothing else is scored, their MLPs are compared, as the sums of their neurons.
    Scores of other methods than the first-order ones are given back as they are.
    """
    if scores.method not in FIRST_ORDER:
        return scores
    kinds = tuple(kind for kind in ("mlp", "attention", "head") if any(c.kind == kind for c in scores.components))
    chosen = list(facts)
    if len(chosen) > max_facts:
        chosen = random.Random(0).sample(chosen, max_facts)
        scored = localizer(model, chosen, **{**options, "kinds": kinds or ("neuron",)})
    else:
        scored = scores
    if not kinds:
        kinds, scored = ("mlp",), _of_mlps(scored)
    form = str(scores.options.get("form", "denoise"))
    shared: dict[str, Any] = {name: scores.options[name] for name in SHARED if name in scores.options}
    patched = [
        activation_patching(model, chosen, form=one, kinds=kinds, roles=("all",), **shared)  # pyright: ignore[reportArgumentType]
        for one in (("denoise", "noise") if form == "both" else (form,))
    ]
    exact = replace(patched[0], per_fact=sum(one.per_fact for one in patched) / len(patched))
    if scored.options.get("grad_drop"):  # sizes, fact by fact
        exact = replace(exact, per_fact=np.abs(exact.per_fact))
    found = {"n_facts": len(chosen), **agreement(scored, exact)}
    return replace(scores, notes={**scores.notes, "agreement": _finite(found)})


def _of_mlps(scores: ComponentScores) -> ComponentScores:
    """Sums of the neurons of each MLP."""
    layers = sorted({component.layer for component in scores.components})
    own = [[i for i, component in enumerate(scores.components) if component.layer == layer] for layer in layers]
    per_fact = np.stack([scores.per_fact[:, rows].sum(axis=1) for rows in own], axis=1)
    return replace(scores, components=tuple(Component("mlp", layer) for layer in layers), per_fact=per_fact)


def describe_checks(scores: ComponentScores) -> list[str]:
    """The notes that the two functions above left, a line each."""
    lines: list[str] = []
    if isinstance(found := scores.notes.get("agreement"), Mapping):
        lines.append(
            f"agreement with exact patching ({found['n_facts']} facts): Pearson {_shown(found['pearson'])}, Spearman "
            f"{_shown(found['spearman'])}, {round(found['top_k_recall'] * found['k'])} of the top {found['k']} of "
            f"{found['n_components']} the same"
        )
    if isinstance(found := scores.notes.get("stability"), Mapping):
        line = (
            f"stability of the ranking (Spearman): {_shown(found['subjects'])} over draws of {found['n_subjects']} "
            f"subjects (5% quantile {_shown(found['subjects_lower'])})"
        )
        more = f", {_shown(found['forms'])} between {found['n_forms']} forms of the prompt"
        lines.append(line + (more if found["n_forms"] > 1 else ""))
    return lines


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
