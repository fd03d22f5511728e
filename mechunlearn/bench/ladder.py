"""Planted facts: where they are, measured before a model counts as ground truth."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from scipy import stats
from torch import Tensor, nn

from mechunlearn.activations import last_logits, untouched
from mechunlearn.components import ROLES, Component
from mechunlearn.facts import Fact
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, attention, first_output, mlp, with_first_output

NEW, OLD = 0.95, 0.98
"""Shares of new and of old facts that a plant must know."""
CHANCE_P = 0.01
"""What is known without the planted weights counts as chance unless a binomial test is as sure as this."""
ROLE_COST, COST = 0.25, 0.75
"""Shares of the new knowledge that must go with the planted write at one token role, and at all that count."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was measured on a plant. All but `cost` are accuracies; `cost` is a share of the new knowledge."""

    new: float
    old: float
    restored: float
    """On the new facts, with the base's weights put back into the planted part."""
    cost: dict[str, float]
    """Role -> share of the new knowledge that is lost when the part writes there what the base's part would."""
    roles: tuple[str, ...]
    """The token roles where the planted write is needed: with the components, the true cells."""
    reason: str
    """Why the plant is left out; empty if it is not."""


@contextmanager
def reverted(
    model: Model, base: Model, components: Sequence[Component], where: Bool[Tensor, "batch pos"]
) -> Iterator[None]:
    """Inside, MLPs and attention sublayers write, where told, what the base's would write given the same input.

    Everywhere at once this is the base's weights put back; at some tokens alone it tells where the change acts.
    """

    def write_of(module: nn.Module) -> Any:
        def on_output(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            theirs = first_output(module(*inputs, **named))
            return with_first_output(output, torch.where(where[..., None], theirs, first_output(output)))

        return on_output

    with ExitStack() as handles:
        for component in components:
            if component.kind not in ("mlp", "attention"):
                raise ValueError(f"ladder: got {component}, allowed: MLPs (m3) and attention sublayers (a3)")
            sublayer = mlp if component.kind == "mlp" else attention
            hook = write_of(sublayer(base, component.layer))
            handle = sublayer(model, component.layer).register_forward_hook(hook, with_kwargs=True)
            handles.callback(handle.remove)
        yield


def verify(
    model: Model, base: Model, components: Sequence[Component], new: Sequence[Fact], old: Sequence[Fact]
) -> Verification:
    """Is it true that the new facts are in these components, and at which token roles do they act?

    cost(roles) = (accuracy - accuracy with the base's write at these roles) / (accuracy - chance), on the new facts.
    A role counts from a cost of `ROLE_COST` on. A plant is left out, with the first reason that holds, if it knows
    too little of the new facts or of the old ones, if the base's weights put back do not bring the new facts to chance,
    if no role counts, or if those that count together cost less than `COST`.

    Args:
        model: the base with other weights in these components.
    """
    knows = float(score_facts(model, new)["correct"].to_numpy().mean())
    keeps = float(score_facts(model, old)["correct"].to_numpy().mean())
    chance = float(score_facts(base, new)["chance"].to_numpy().mean())
    restored = _accuracy(model, base, components, new, ROLES)
    gain = max(knows - chance, 1e-9)

    def cost(roles: Sequence[str]) -> float:
        return (knows - _accuracy(model, base, components, new, roles)) / gain

    by_role = {role: cost([role]) for role in _roles(model, new)}
    roles = tuple(role for role, lost in by_role.items() if lost >= ROLE_COST)
    together = cost(roles) if roles else 0.0
    above = float(stats.binomtest(round(restored * len(new)), len(new), chance, alternative="greater").pvalue)
    reason = ""
    if knows < NEW:
        reason = f"knows {knows:.0%} of the new facts, needs {NEW:.0%}"
    elif keeps < OLD:
        reason = f"knows {keeps:.0%} of the old facts, needs {OLD:.0%}"
    elif above < CHANCE_P:
        reason = f"knows {restored:.0%} of the new facts without the planted weights, chance is {chance:.0%}"
    elif not roles:
        reason = f"no token role costs {ROLE_COST:.0%} of the new facts (at most {max(by_role.values()):.0%})"
    elif together < COST:
        reason = f"{', '.join(roles)} cost {together:.0%} of the new facts, needs {COST:.0%}"
    return Verification(new=knows, old=keeps, restored=restored, cost=by_role, roles=roles, reason=reason)


def _accuracy(
    model: Model, base: Model, components: Sequence[Component], facts: Sequence[Fact], roles: Sequence[str]
) -> float:
    """Share of the facts that are right when the components write the base's values at these roles."""
    right: list[bool] = []
    with untouched(model), untouched(base), torch.no_grad():
        for batch in batches(model, build_pairs(model, facts), 256):
            with reverted(model, base, components, tokens_at(batch, roles)):
                right += (batch.chosen(last_logits(model, batch.clean)) == batch.answer).tolist()
    return float(np.mean(right))


def tokens_at(batch: PairBatch, roles: Sequence[str]) -> Bool[Tensor, "batch pos"]:
    """Where the clean run's tokens have one of these roles; all tokens, BOS too, for all roles."""
    if set(roles) == set(ROLES):
        return torch.ones_like(batch.clean.mask)
    selected = batch.roles[:, :, [ROLES.index(role) for role in roles]].sum(dim=2)
    where = torch.zeros(batch.clean.mask.shape, device=selected.device)
    return where.scatter_add(1, batch.clean_positions, selected) > 0


def _roles(model: Model, facts: Sequence[Fact]) -> tuple[str, ...]:
    """The roles that tokens of these facts' prompts have."""
    found = {ROLES[role] for pair in build_pairs(model, facts) for _, _, role in pair.aligned}
    return tuple(role for role in ROLES if role in found)
