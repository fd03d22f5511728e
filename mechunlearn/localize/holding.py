"""Exact patching of one sublayer at one token role while others are held: what both methods that hold share."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Change, Place, hooked, last_logits, place_of, untouched
from mechunlearn.components import ROLES, Component
from mechunlearn.facts import Fact
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs, describe_pairs, fact_means, record_donor
from mechunlearn.models import Model

Sublayer = Literal["mlp", "attention"]


def held_effects(
    model: Model,
    facts: Sequence[Fact],
    components: Sequence[Component],
    held: Sequence[Sublayer],
    *,
    pairs_per_fact: int,
    batch_size: int,
    seed: int,
) -> tuple[Float[np.ndarray, "fact component role"], dict[str, Any]]:
    """Effects of patching each sublayer at each token role, averaged over a fact's pairs, and notes on the pairs.

    effect(c, role) = m(clean run) - m(clean run in which c writes at the role's tokens what it writes on the donor's
    run, and every other sublayer of the held kinds writes at all tokens what it writes on the clean run), with
    m = logit(true answer) - logit(donor's answer).
    """
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, seed=seed)
    with untouched(model), torch.no_grad():
        scored = ((batch, _effects(model, batch, components, held)) for batch in batches(model, pairs, batch_size))
        return fact_means(len(facts), scored), describe_pairs(pairs)


def _effects(
    model: Model, batch: PairBatch, components: Sequence[Component], held: Sequence[Sublayer]
) -> Float[Tensor, "batch component role"]:
    layers = range(model.n_layers)
    kept: list[Place] = [(kind, layer) for kind in dict.fromkeys(held) for layer in layers]
    places = [place_of(component) for component in components]
    with hooked(model, record=[*dict.fromkeys((*kept, *places))]) as own:
        clean = batch.logit_diff(last_logits(model, batch.clean))
    donor = record_donor(model, batch, places)
    effects = torch.zeros(len(clean), len(components), len(ROLES), device=clean.device, dtype=clean.dtype)
    present = [role for i, role in enumerate(ROLES) if bool(batch.roles[..., i].any())]
    for number, place in enumerate(places):
        holding = {other: _write(own[other]) for other in kept if other != place}
        for role in present:
            patched = _write(batch.put(own[place], donor[place], (role,)))
            with hooked(model, change=holding | {place: patched}):
                after = batch.logit_diff(last_logits(model, batch.clean))
            effects[:, number, ROLES.index(role)] = clean - after
    return effects


def _write(value: Tensor) -> Change:
    return lambda _: value
