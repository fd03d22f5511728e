"""A disruption budget: no edit disturbs what is kept by more than was allowed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechunlearn.edit.training import Trainable, masked_trainable, substituted
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.metrics import Reference, kl_from, reference_of
from mechunlearn.models import Model
from mechunlearn.prompts import render

N_WATCHED = 48
CHECKS = 12  # per training: a check costs about as much as a step
RUNAWAY = 20.0  # times the limit: no later step mends that; below it the first steps disturb what later ones mend
BISECTIONS = 5  # to within 1/32 of the way
MORE_BISECTIONS = 10  # where not even 1/32 of the way is inside


@dataclass(kw_only=True, eq=False)
class Budget:
    """Watches the damage while a `Trainable` is trained; where it ends beyond the limit, brings it back.

    Back is on the straight line to the last state that a check found inside (the start, if none was), as far as it
    takes. Training ends early only where the damage runs away: what is beyond the limit may yet come back by itself.
    Damage is the mean KL(original || edited) over the tokens of watched retained prompts, in nats: the measure that
    `evaluate` takes on `retain_test`, on facts that are in neither the training nor the test.
    """

    model: Model
    trainable: Trainable
    reference: Reference
    limit: float
    every: int
    damage: float = 0.0
    """At the last state that was kept."""
    stopped_at: int | None = None
    """The step after which training ended early."""
    brought_back: bool = False
    """Whether the training's end was beyond the limit."""
    _inside: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, trainable: Trainable, watched: Sequence[Fact], *, limit: float, steps: int) -> "Budget":
        """Take the original's predictions on the watched facts' prompts.

        Raises:
            ValueError: no facts to watch.
        """
        if not watched:
            raise ValueError("max_damage: split.retain_train has no facts to watch; give it facts, or no max_damage")
        return cls(
            model=model, trainable=trainable, limit=limit, every=max(1, steps // CHECKS),
            reference=reference_of(model, [render(fact, "prompt") for fact in watched]), _inside=_copy(trainable),
        )  # fmt: skip

    def __call__(self, step: int) -> bool:
        """After a step: whether to end here. `train` calls it."""
        if step % self.every:
            return False
        now = self.measure()
        if now <= self.limit:
            self._inside, self.damage = _copy(self.trainable), now
        elif not now < RUNAWAY * self.limit:  # not a number, too
            self._bisect()
            self.stopped_at = step
        return self.stopped_at is not None

    def finish(self) -> None:
        """After the last step, which no check may have looked at."""
        if self.stopped_at is not None:
            return
        self.damage = self.measure()
        if self.damage > self.limit:
            self._bisect()

    def notes(self) -> Mapping[str, Any]:
        """What is recorded beside the edit."""
        return {
            "max_damage": self.limit, "damage": self.damage, "stopped_at": self.stopped_at,
            "brought_back": self.brought_back,
        }  # fmt: skip

    def measure(self) -> float:
        """The damage at the present state of what is trained, in nats."""
        with substituted(self.model, self.trainable.overrides()):
            return kl_from(self.model, self.reference)

    @torch.no_grad()
    def _bisect(self) -> None:
        """Go as far from the last state inside towards the present one as the limit allows, to within 1/32."""
        self.brought_back = True
        outside, inside = _copy(self.trainable), self._inside
        low, high = 0.0, 1.0
        for n in range(BISECTIONS + MORE_BISECTIONS):
            if n >= BISECTIONS and low > 0:
                break
            share = (low + high) / 2
            self._set(inside, outside, share)
            damage = self.measure()
            if damage <= self.limit:
                low, self.damage = share, damage
            else:
                high = share
        self._set(inside, outside, low)

    def _set(self, inside: Mapping[str, Tensor], outside: Mapping[str, Tensor], share: float) -> None:
        for name, leaf in self.trainable.leaves.items():
            leaf.copy_(torch.lerp(inside[name], outside[name], share))


def brought_within(
    model: Model, mask: ParameterMask, values: Mapping[str, Tensor], watched: Sequence[Fact], *, limit: float
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Scale a finished change of the masked entries down until it does no more than the damage allowed.

    Returns:
        The values, and the notes of the budget.
    """
    trainable = masked_trainable(model, mask)
    budget = Budget.of(model, trainable, watched, limit=limit, steps=1)
    with torch.no_grad():
        for name, leaf in trainable.leaves.items():
            leaf.copy_(values[name].to(leaf).reshape(leaf.shape))
    budget.finish()
    parameters = dict(model.hf.named_parameters())
    made = {
        name: leaf.detach().reshape(-1).to("cpu", parameters[name].dtype) for name, leaf in trainable.leaves.items()
    }
    return made, budget.notes()


def _copy(trainable: Trainable) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in trainable.leaves.items()}


def watched_and_retained(split: FactSplit, limit: float | None) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """The retained facts that a budget of this limit watches (none without one), and those that an editor keeps by."""
    return ((), split.retain_train) if limit is None else set_aside(split.retain_train, split.forget)


def set_aside(retain: Sequence[Fact], forget: Sequence[Fact]) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """(watched, trained on): every k-th retained fact, as many of the forgotten relations as of others if there are.

    At most a quarter of either kind is set aside, so that a small retain set still trains the editor.
    """
    relations = {fact.relation for fact in forget}
    watched: list[Fact] = []
    for near in (True, False):
        kind = [fact for fact in retain if (fact.relation in relations) is near]
        n = min(N_WATCHED // 2, -(-len(kind) // 4))
        watched += kind[:: max(1, len(kind) // n)][:n] if n else []
    taken = {fact.key for fact in watched}
    return tuple(watched), tuple(fact for fact in retain if fact.key not in taken)
