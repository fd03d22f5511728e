"""Integrated gradients: first-order scores whose gradient is a mean along the way from the corrupt to the clean run."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Change, Place, exact, hooked, last_logits
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.backward_rules import Rule, relevance_rules
from mechunlearn.localize.first_order import (
    BatchScores,
    FirstOrderKind,
    assemble,
    between,
    by_role,
    difference,
    midpoints,
    places_of,
    run,
    score_pairs,
)
from mechunlearn.localize.pairs import Donors, PairBatch
from mechunlearn.models import Model

Over = Literal["inputs", "activations"]


@LOCALIZERS.register("integrated_gradients", source="Sundararajan et al. 2017; Hanna et al. 2024, arXiv:2403.17806")
def integrated_gradients(
    model: Model,
    facts: Sequence[Fact],
    *,
    over: Over = "inputs",
    steps: Annotated[int, Field(ge=1)] = 5,
    rules: tuple[Rule, ...] = (),
    kinds: tuple[FirstOrderKind, ...] = ("mlp", "attention"),
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    donors: Donors = "other_answer",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Attribution patching with the gradient averaged along a straight line, so that saturation misleads it less.

    score(c) = sum over d_model of (a_clean - a_corrupt) * mean over j of d metric / d a at the j-th point, summed over
    the tokens of a role. The points lie at (j - 1/2) / steps of the way (midpoint rule).

    inputs: the line is drawn between the two runs' embeddings, all components share its points; the cost is
        (2 + 2 steps) forward passes. activations: each layer's own activation is moved along its line in the
        corrupt run, all else follows; `steps` forward and backward passes for every layer and kind, so for few layers
        or small models.

    Sign and units: as `attribution_patching`. Over activations the score approaches the exact effect of restoring the
        activation at all shared tokens as steps grow (the sum over roles does; a single role's part does not).

    Args:
        steps: 5 are enough to rank, 20 to report.
        rules: local derivatives that are replaced as in `relevance_patching`, at every point; without any, gradients
            are plain. With some, scores over activations no longer approach the exact effect.

    Raises:
        ValueError: no facts, no kinds, or a fact that cannot be paired.
        NotSupported: a norm or an MLP that the rules do not cover.

    Differs from the source: midpoint instead of left-hand points, which err to first order in 1 / steps; tokens without
        a partner in the other prompt stay as they are in the corrupt run.
    Source: Sundararajan et al. 2017, arXiv:1703.01365; over model components Hanna et al. 2024, arXiv:2403.17806.
    """
    scores = over_inputs if over == "inputs" else over_activations
    return score_pairs(
        model, facts, lambda batch, components: scores(model, batch, components, steps),
        method="integrated_gradients", kinds=kinds, pairs_per_fact=pairs_per_fact, donors=donors, batch_size=batch_size,
        seed=seed,
        rule=relevance_rules(model, rules), options={"over": over, "steps": steps, "rules": list(rules)},
    )  # fmt: skip


def over_inputs(model: Model, batch: PairBatch, components: Sequence[Component], steps: int) -> BatchScores:
    """Gradients along the line between the embeddings; call inside `untouched`."""
    places = places_of(components)
    embedded: list[Tensor] = []
    keep: Change = lambda output: embedded.append(output) or output  # noqa: E731
    clean = run(model, batch, batch.clean, places, gradient=False, change=keep)
    corrupt = run(model, batch, batch.corrupt, places, gradient=False, change=keep)
    total: dict[Place, Tensor] = {}
    for share in midpoints(steps):
        point = between(batch, embedded[0], embedded[1], share)
        at = run(model, batch, batch.corrupt, places, gradient=True, change=lambda _, point=point: point)
        for place in places:
            gradient = exact(batch.take(at.gradients.pop(place), batch.corrupt_positions)) / steps
            total[place] = total[place] + gradient if place in total else gradient
    effects = {
        place: by_role(model, batch, place, total.pop(place)
                       * difference(batch, clean.activations.pop(place), corrupt.activations.pop(place)))
        for place in places
    }  # fmt: skip
    return assemble(components, effects), clean.metric, corrupt.metric


def over_activations(model: Model, batch: PairBatch, components: Sequence[Component], steps: int) -> BatchScores:
    """Gradients along each place's own line, place by place; call inside `untouched`."""
    places = places_of(components)
    clean = run(model, batch, batch.clean, places, gradient=False)
    corrupt = run(model, batch, batch.corrupt, places, gradient=False)
    effects: dict[Place, Tensor] = {}
    for place in places:
        ends = clean.activations.pop(place), corrupt.activations.pop(place)
        moved = difference(batch, *ends)
        total = torch.zeros_like(moved)
        for share in midpoints(steps):
            point = between(batch, *ends, share).requires_grad_()
            with torch.enable_grad(), hooked(model, change={place: lambda _, point=point: point}):
                metric = batch.logit_diff(last_logits(model, batch.corrupt))
            gradient = torch.autograd.grad(metric.sum(), point)[0]
            total += exact(batch.take(gradient, batch.corrupt_positions)) / steps
        effects[place] = by_role(model, batch, place, total * moved)
    return assemble(components, effects), clean.metric, corrupt.metric
