"""One engine for every first-order score: the difference of two runs' activations times a gradient, place by place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Change, Place, Tokens, by_place, exact, hooked, last_logits, untouched
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize.kinds import components_of
from mechunlearn.localize.pairs import Donors, PairBatch, batches, build_pairs, describe_pairs, fact_means
from mechunlearn.models import Model, n_parts

Form = Literal["denoise", "noise", "both"]
FirstOrderKind = Literal["mlp", "attention", "head", "neuron"]
BatchScores = tuple[Float[Tensor, "batch component role"], Float[Tensor, " batch"], Float[Tensor, " batch"]]
"""Scores, the metric on the clean run, the metric on the corrupt run."""

SIGN = "logits; positive: the component's value on the fact's own run supports the true answer"


def score_pairs(
    model: Model,
    facts: Sequence[Fact],
    score: Callable[[PairBatch, Sequence[Component]], BatchScores],
    *,
    method: str,
    kinds: Sequence[FirstOrderKind],
    pairs_per_fact: int,
    donors: Donors,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any],
    rule: AbstractContextManager[object] | None = None,
    sign: str = SIGN,
) -> ComponentScores:
    """Run a scoring function over the facts' pairs, batch by batch, and average over each fact's pairs.

    Args:
        donors: "same_answer" gives the scores' null distribution, see `shuffled_pairs`.
        rule: inside it the model computes its gradients, see `backward_rules`.

    Raises:
        ValueError: no facts, no kinds, or a fact that cannot be paired.
    """
    components = components_of(model, method, kinds)
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, donors=donors, seed=seed)
    metrics: list[tuple[float, float]] = []

    def scored() -> Iterator[tuple[PairBatch, Tensor]]:
        for batch in batches(model, pairs, batch_size):
            scores, clean, corrupt = score(batch, components)
            metrics.extend(zip(clean.tolist(), corrupt.tolist(), strict=True))
            yield batch, scores

    with untouched(model), rule or nullcontext():
        per_fact = fact_means(len(facts), scored())
    clean_mean, corrupt_mean = np.mean(metrics, axis=0)
    return ComponentScores(
        method=method,
        metric="logit_diff",
        sign=sign,
        components=components,
        per_fact=per_fact,
        options={**options, "kinds": list(kinds), "pairs_per_fact": pairs_per_fact, "donors": donors,
                 "batch_size": batch_size, "seed": seed},
        facts_sha256=hash_facts(facts),
        notes={**describe_pairs(pairs), "logit_diff_clean": float(clean_mean),
               "logit_diff_corrupt": float(corrupt_mean)},
    )  # fmt: skip


def first_order_scores(
    model: Model,
    batch: PairBatch,
    components: Sequence[Component],
    form: Form,
    *,
    clean_embedding: Change | None = None,
) -> BatchScores:
    """Scores of one batch with a gradient taken at the corrupt, the clean or both runs; call inside `untouched`.

    Args:
        clean_embedding: changes the clean run's embeddings, e.g. to a point between corrupt and clean.
    """
    places = places_of(components)
    clean = run(model, batch, batch.clean, places, gradient=form != "denoise", change=clean_embedding)
    corrupt = run(model, batch, batch.corrupt, places, gradient=form != "noise")
    effects: dict[Place, Tensor] = {}
    for place in places:
        moved = difference(batch, clean.activations.pop(place), corrupt.activations.pop(place))
        gradients: list[Tensor] = []
        if form != "noise":
            gradients.append(exact(batch.take(corrupt.gradients.pop(place), batch.corrupt_positions)))
        if form != "denoise":
            gradients.append(exact(batch.take(clean.gradients.pop(place), batch.clean_positions)))
        mean = gradients[0] if len(gradients) == 1 else (gradients[0] + gradients[1]) / 2
        effects[place] = by_role(model, batch, place, moved * mean)
    return assemble(components, effects), clean.metric, corrupt.metric


def places_of(components: Sequence[Component]) -> list[Place]:
    """Where the components' activations are, each place once, in the order of layers."""
    return sorted(by_place(components), key=lambda place: place[::-1])


def difference(batch: PairBatch, clean: Tensor, corrupt: Tensor) -> Float[Tensor, "batch aligned width"]:
    """Clean minus corrupt at the tokens both prompts have, in float32: half precision would lose small ones."""
    return exact(batch.take(clean, batch.clean_positions)) - exact(batch.take(corrupt, batch.corrupt_positions))


def by_role(
    model: Model, batch: PairBatch, place: Place, product: Float[Tensor, "batch aligned width"]
) -> Float[Tensor, "batch part role"]:
    """Sum products over d_model, or over each head, or not at all for neurons, and over the tokens of each role."""
    parts = n_parts(model, place[0])
    of_parts = product if parts == product.shape[-1] else product.unflatten(-1, (parts, -1)).sum(-1)
    return torch.einsum("bah,bar->bhr", of_parts, batch.roles.to(of_parts.dtype))


def assemble(
    components: Sequence[Component], effects: Mapping[Place, Float[Tensor, "batch part role"]]
) -> Float[Tensor, "batch component role"]:
    """The places' effects in the order of the components."""
    some = next(iter(effects.values()))
    scores = some.new_empty(some.shape[0], len(components), some.shape[2])
    for place, rows in by_place(components).items():
        scores[:, rows] = effects[place][:, [components[row].index or 0 for row in rows]]
    return scores


@dataclass(frozen=True, kw_only=True)
class Run:
    """Activations of one forward pass, with their gradients if asked for."""

    activations: dict[Place, Tensor]
    gradients: dict[Place, Tensor]
    metric: Float[Tensor, " batch"]


def run(
    model: Model,
    batch: PairBatch,
    tokens: Tokens,
    places: Sequence[Place],
    *,
    gradient: bool,
    change: Change | None = None,
) -> Run:
    """Only the embeddings require grad, so the graph holds activations and no parameter gradients."""

    def leaf(output: Tensor) -> Tensor:
        return (change(output) if change else output).detach().requires_grad_(gradient)

    with torch.set_grad_enabled(gradient), hooked(model, record=places, change_embedding=leaf) as seen:
        metric = batch.logit_diff(last_logits(model, tokens))
        # each example's metric depends on its own activations alone, so one backward of the sum serves all
        found = torch.autograd.grad(metric.sum(), [seen[place] for place in places]) if gradient else ()
    activations = {place: value.detach() for place, value in seen.items()}
    gradients = dict(zip(places, found, strict=True)) if gradient else {}
    return Run(activations=activations, gradients=gradients, metric=metric.detach())


def midpoints(steps: int) -> list[float]:
    """The middles of equal parts of [0, 1]."""
    return [(j + 0.5) / steps for j in range(steps)]


def between(batch: PairBatch, clean: Tensor, corrupt: Tensor, share: float) -> Float[Tensor, "batch corrupt_pos width"]:
    """The corrupt run's activation, moved so far towards the clean run's at the tokens both prompts have."""
    row, place = batch.roles.any(dim=2).nonzero(as_tuple=True)
    here, there = batch.corrupt_positions[row, place], batch.clean_positions[row, place]
    point = corrupt.clone()
    point[row, here] = torch.lerp(corrupt[row, here], clean[row, there], share)
    return point
