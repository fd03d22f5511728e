"""Gates in [0, 1] over masked weights, and setting the weights of the lowest gates to zero."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mechunlearn.edit.budget import Budget
from mechunlearn.edit.training import Trainable
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model

_HALVINGS = 6


def gated_trainable(model: Model, mask: ParameterMask) -> Trainable:
    """Train a gate m for every masked entry: W' = m * W there, W elsewhere; every m is 1 at first.

    Products are taken in float32, so that the model is bit-identical where m is 1. `clamp` keeps gates in [0, 1].
    """
    parameters = dict(model.hf.named_parameters())
    bases = {name: parameters[name].detach() for name in mask.entries}
    selected = {name: None if mask.is_whole(name) else mask.full(name).to(model.device) for name in bases}

    def leaf(name: str) -> nn.Parameter:
        where = selected[name]
        shape = bases[name].shape if where is None else (int(where.sum()),)
        return nn.Parameter(torch.ones(shape, device=model.device))

    def compute(leaves: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        made = {}
        for name, base in bases.items():
            where = selected[name]
            if where is None:
                made[name] = (base.float() * leaves[name]).to(base.dtype)
            else:
                made[name] = base.masked_scatter(where, (base[where].float() * leaves[name]).to(base.dtype))
        return made

    return Trainable(leaves={name: leaf(name) for name in bases}, compute=compute)


@torch.no_grad()
def clamp(trainable: Trainable) -> None:
    """Put gates that a step took out of [0, 1] back to its ends."""
    for leaf in trainable.leaves.values():
        leaf.clamp_(0, 1)


def lowest(gates: Mapping[str, Tensor], n: int, *, seed: int) -> dict[str, Tensor]:
    """Where the `n` lowest gates of all are, by name; equal ones are drawn."""
    flat = torch.cat([gate.detach().flatten() for gate in gates.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if n:
        edge = flat.kthvalue(n).values
        chosen |= flat < edge
        equal = (flat == edge).nonzero()[:, 0]
        drawn = torch.randperm(len(equal), generator=torch.Generator().manual_seed(seed))
        chosen[equal[drawn[: n - int(chosen.sum())].to(equal.device)]] = True
    parts = chosen.split([gate.numel() for gate in gates.values()])
    return {name: part.view_as(gate) for (name, gate), part in zip(gates.items(), parts, strict=True)}


@torch.no_grad()
def prune(trainable: Trainable, n: int, watch: Budget | None = None, *, seed: int) -> dict[str, float | int]:
    """Make the gates 0 or 1: the `n` lowest are 0. With a budget fewer are, as many as it allows, to within n / 64.

    Returns:
        What is recorded beside the edit: how many weights are zeroed, how many of those the training had lowered at
        all, and with a budget the damage.
    """
    gates = {name: leaf.detach().clone() for name, leaf in trainable.leaves.items()}

    def set_lowest(k: int) -> None:
        for name, low in (lowest(gates, k, seed=seed) if gates else {}).items():
            trainable.leaves[name].copy_(~low)

    def damage() -> float:
        return 0.0 if watch is None else watch.measure()

    set_lowest(n)
    found = damage()
    if watch is not None and found > watch.limit:
        inside, outside, found = 0, n, 0.0
        for _ in range(_HALVINGS):
            middle = (inside + outside) // 2
            set_lowest(middle)
            if (now := damage()) <= watch.limit:
                inside, found = middle, now
            else:
                outside = middle
        n = inside
        set_lowest(n)
    lowered = sum(int(((leaf == 0) & (gates[name] < 1)).sum()) for name, leaf in trainable.leaves.items())
    notes: dict[str, float | int] = {"n_pruned": n, "n_lowered": lowered}
    return notes if watch is None else {**notes, "max_damage": watch.limit, "damage": found}
