"""Attribution patching: every component's effect on the facts, estimated from one gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Change, Place, Tokens, exact, hooked, last_logits, untouched
from mechunlearn.components import ROLES, Component, ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.pairs import Donors, PairBatch, batches, build_pairs, describe_pairs
from mechunlearn.models import Model, all_components

Form = Literal["denoise", "noise", "both"]


@LOCALIZERS.register("attribution_patching", source="Nanda 2023; Kramár et al. 2024, arXiv:2403.00745")
def attribution_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    form: Form = "denoise",
    metric: Literal["logit_diff"] = "logit_diff",
    kinds: tuple[Literal["mlp", "attention", "head"], ...] = ("mlp", "attention"),
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    donors: Donors = "other_answer",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Estimate with one backward pass how much each component carries the facts.

    score(c) = sum over d_model of (a_clean - a_corrupt) * g at every token both prompts have, summed over the tokens of
    a role, averaged over a fact's pairs. denoise: g = d metric / d a on the corrupt run; noise: on the clean
    run; both: the mean of the two. Products are taken in float32.

    Shapes: a_clean, a_corrupt, g are [batch pos d_model]; the result is [fact component role].
    Sign and units: logits. Positive: restoring c's clean value moves the metric towards the fact; the same sign for all
        forms. First order, so not bounded and not exact: see `resample_ablation`.

    Args:
        metric: logit(true answer) - logit(donor's answer) after the prompt, at the first token where they differ.
        kinds: "head" scores every head's z before the output projection.
        pairs_per_fact: donors per fact, see `pairs.build_pairs`; tokens without a partner in the donor's prompt
            count as unchanged.
        donors: "same_answer" gives the scores' null distribution, see `shuffled_pairs`.

    Raises:
        ValueError: no facts, no kinds, or a fact that cannot be paired.

    Differs from the source: plain gradients, without AtP*'s QK fix and GradDrop; tokens aligned by role.
    Source: Nanda 2023, "Attribution Patching"; Kramár et al. 2024, arXiv:2403.00745.
    """
    if not kinds:
        raise ValueError("attribution_patching: option 'kinds': got none, allowed: mlp, attention, head")
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, donors=donors, seed=seed)
    components = all_components(model, tuple(dict.fromkeys(kinds)))
    total = np.zeros((len(facts), len(components), len(ROLES)))
    metrics: list[tuple[float, float]] = []
    with untouched(model):
        for batch in batches(model, pairs, batch_size):
            scores, clean, corrupt = first_order_scores(model, batch, components, form)
            np.add.at(total, [pair.fact for pair in batch.pairs], scores.double().cpu().numpy())
            metrics += zip(clean.tolist(), corrupt.tolist(), strict=True)
    n_pairs = np.bincount([pair.fact for pair in pairs], minlength=len(facts))
    clean_mean, corrupt_mean = np.mean(metrics, axis=0)
    return ComponentScores(
        method="attribution_patching",
        metric=metric,
        sign="logits; positive: the component's value on the fact's own run supports the true answer",
        components=components,
        per_fact=total / n_pairs[:, None, None],
        options={
            "form": form,
            "metric": metric,
            "kinds": list(kinds),
            "pairs_per_fact": pairs_per_fact,
            "donors": donors,
            "batch_size": batch_size,
            "seed": seed,
        },
        facts_sha256=hash_facts(facts),
        notes={
            **describe_pairs(pairs),
            "logit_diff_clean": float(clean_mean),
            "logit_diff_corrupt": float(corrupt_mean),
        },
    )


def first_order_scores(
    model: Model,
    batch: PairBatch,
    components: Sequence[Component],
    form: Form,
    *,
    clean_embedding: Change | None = None,
) -> tuple[Float[Tensor, "batch component role"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Scores of one batch and the metric on the clean and on the corrupt run; call inside `untouched`.

    Args:
        clean_embedding: changes the clean run's embeddings, e.g. to a point between corrupt and clean.
    """
    places = sorted({_place(component) for component in components})
    clean = _run(model, batch, batch.clean, places, gradient=form != "denoise", change=clean_embedding)
    corrupt = _run(model, batch, batch.corrupt, places, gradient=form != "noise")
    effects: dict[Place, Float[Tensor, "batch part role"]] = {}
    for place in places:
        activation_c, activation_k = clean.activations.pop(place), corrupt.activations.pop(place)
        difference = exact(batch.take(activation_c, batch.clean_positions))
        difference = difference - exact(batch.take(activation_k, batch.corrupt_positions))
        gradients = []
        if form != "noise":
            gradients.append(exact(batch.take(corrupt.gradients.pop(place), batch.corrupt_positions)))
        if form != "denoise":
            gradients.append(exact(batch.take(clean.gradients.pop(place), batch.clean_positions)))
        product = difference * torch.stack(gradients).mean(dim=0)
        parts = model.n_heads if place[0] == "head" else 1
        by_part = product.unflatten(-1, (parts, -1)).sum(-1)
        effects[place] = torch.einsum("bah,bar->bhr", by_part, batch.roles.to(by_part.dtype))
    scores = [effects[_place(component)][:, component.index or 0] for component in components]
    return torch.stack(scores, dim=1), clean.metric, corrupt.metric


def _place(component: Component) -> Place:
    assert component.kind != "neuron"  # not among the kinds offered
    return component.kind, component.layer


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Activations of one forward pass, with their gradients if asked for."""

    activations: dict[Place, Tensor]
    gradients: dict[Place, Tensor]
    metric: Float[Tensor, " batch"]


def _run(
    model: Model,
    batch: PairBatch,
    tokens: Tokens,
    places: Sequence[Place],
    *,
    gradient: bool,
    change: Change | None = None,
) -> _Run:
    """Only the embeddings require grad, so the graph holds activations and no parameter gradients."""

    def leaf(output: Tensor) -> Tensor:
        return (change(output) if change else output).detach().requires_grad_(gradient)

    with torch.set_grad_enabled(gradient), hooked(model, record=places, change_embedding=leaf) as seen:
        metric = batch.logit_diff(last_logits(model, tokens))
        # each example's metric depends on its own activations alone, so one backward of the sum serves all
        found = torch.autograd.grad(metric.sum(), [seen[place] for place in places]) if gradient else ()
    activations = {place: value.detach() for place, value in seen.items()}
    gradients = dict(zip(places, found, strict=True)) if gradient else {}
    return _Run(activations=activations, gradients=gradients, metric=metric.detach())
