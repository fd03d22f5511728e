"""Hard-concrete gates, and runs in which gates mix a component's own activation with the donor's."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Change, Place, hooked, last_logits
from mechunlearn.components import ROLES
from mechunlearn.localize.pairs import PairBatch
from mechunlearn.models import Model

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # beta, gamma, zeta: Louizos et al. 2018, section 4.1


def hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """Gates in [0, 1], exactly 0 or 1 with positive probability, from uniform noise; broadcasts."""
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    stretched = ((uniform.logit() + logits) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def probability_open(logits: Tensor) -> Tensor:
    """P(gate > 0): the expected L0 norm of one gate."""
    return (logits - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


def settled(logits: Tensor) -> Tensor:
    """The gate that stands for its distribution once trained (Louizos et al. 2018, equation 13)."""
    return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def gated_logits(
    model: Model,
    batch: PairBatch,
    donors: Mapping[Place, Tensor],
    gates: Float[Tensor, "batch component role"],
    places: Mapping[Place, Sequence[int]],
) -> Float[Tensor, "batch d_vocab"]:
    """Logits of the fact's run with every place's parts mixed with the donor's; the last axis is 5 roles or 1.

    Args:
        places: for each place the columns of `gates` that are its parts (one, or each head's or neuron's).
    """
    roles = batch.roles if gates.shape[-1] == len(ROLES) else batch.roles.sum(dim=-1, keepdim=True)
    row, at = batch.roles.any(dim=2).nonzero(as_tuple=True)

    def mixing(place: Place) -> Change:
        def change(value: Tensor) -> Tensor:
            gate = torch.einsum("bar,bpr->bap", roles.to(gates.dtype), gates[:, list(places[place])])[row, at]
            clean, corrupt = batch.clean_positions[row, at], batch.corrupt_positions[row, at]
            own, donor = (
                v.unflatten(-1, (gate.shape[-1], -1)) for v in (value[row, clean], donors[place][row, corrupt])
            )
            mixed = donor + gate[..., None].to(value.dtype) * (own - donor)
            changed = value.clone()
            changed[row, clean] = mixed.flatten(-2)
            return changed

        return change

    with hooked(model, change={place: mixing(place) for place in places}):
        return last_logits(model, batch.clean)
