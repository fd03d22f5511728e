"""How a relearning attacker searches: settings, rounds of successive halving, and which checkpoint is believed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from torch import Tensor

from mechunlearn.attack.relearning_data import Source
from mechunlearn.attack.results import Health

FEWEST_STEPS = 10  # of a first round: fewer say nothing about a setting
LOUD = 0.1  # in P(true | candidates) on dev


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train."""

    kind: str
    learning_rate: float
    source: Source

    def __str__(self) -> str:
        name = f"{self.kind} lr={self.learning_rate:g}"
        return name if self.source == "shown" else f"{name} from {self.source}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The attacked model at one step of one setting, with what the attacker knows about it."""

    setting: Setting
    step: int
    dev: float
    """Mean P(true | candidates) on attack_dev."""
    health: Health
    leaves: Mapping[str, Tensor]
    """Trained numbers, on the CPU."""

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Healthy before unhealthy, then trained before untrained, whose health says nothing of attacks; then dev."""
        return (self.health.healthy, self.step > 0, self.dev)

    @property
    def promise(self) -> tuple[bool, float]:
        """The same, but what it has not fitted yet does not count against it."""
        return (replace(self.health, fitted=None).healthy, self.dev)


Attempt = Callable[[Setting, frozenset[int], float, bool], tuple[list[Checkpoint], str]]
"""Trains one setting: (setting, steps of the checkpoints, bar, whether to measure the last) -> its checkpoints, and
why it ended early if it did. Health need only be measured where the dev score is above the bar, and of the last."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was tried and what was best; the lists grow while it goes on."""

    best: dict[Source, list[Checkpoint]] = field(default_factory=dict)
    """All checkpoints of the best training of each source."""
    dev_curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """(step, dev score) of the longest training of every setting."""
    rounds: list[dict[str, object]] = field(default_factory=list)
    """The steps and settings of each round."""
    failed: dict[str, str] = field(default_factory=dict)
    """The settings that diverged, with the message."""


def successive_halving(
    settings: Sequence[Setting], attempt: Attempt, *, steps: int, halving: int, eval_every: int | None
) -> Search:
    """Train all settings for a few steps, the `survivors` for `halving` times as many, and so on up to `steps`.

    Source: Jamieson & Talwalkar 2016, arXiv:1502.07943; each round trains anew here instead of going on.
    """
    search = Search()
    budgets = round_steps(steps, len(settings), halving)
    left = list(settings)
    for i, budget in enumerate(budgets):
        search.rounds.append({"steps": budget, "settings": [str(setting) for setting in left]})
        ended: list[Checkpoint] = []
        for setting in left:
            bar = max((c.dev for found in search.best.values() for c in found if c.health.healthy), default=-1.0)
            at = checkpoint_steps(budget, eval_every)
            found, error = attempt(setting, at, bar, i < len(budgets) - 1)
            search.dev_curves[str(setting)] = [(c.step, c.dev) for c in found]
            if error:  # the checkpoints before it still stand
                search.failed[str(setting)] = error
            else:
                ended.append(replace(found[-1], leaves={}))
            before = search.best.get(setting.source)
            if not before or max(c.rank for c in found) > max(c.rank for c in before):
                search.best[setting.source] = found
        left = survivors(ended, ceil(len(settings) / halving ** (i + 1)))
        if not left:  # all of them diverged
            break
    if len(search.failed) == len(search.dev_curves):
        raise ValueError(f"relearning: every setting diverged, first {next(iter(search.failed.values()))}")
    return search


def round_steps(steps: int, n_settings: int, halving: int) -> tuple[int, ...]:
    """Steps of each round: the last one `steps`, each one before 1 / `halving` of the next.

    There are as many as it takes to come down to one setting, but none of fewer than ten steps is put in front.
    """
    rounds = [steps]
    while halving > 1 and n_settings > 1 and round(rounds[0] / halving) >= FEWEST_STEPS:
        rounds.insert(0, round(rounds[0] / halving))
        n_settings = ceil(n_settings / halving)
    return tuple(rounds)


def checkpoint_steps(steps: int, every: int | None) -> frozenset[int]:
    """0, `steps`, and between them the multiples of `every` or, without it, `steps` / 2, / 4, ..., 1."""
    between = range(0, steps, every) if every else (steps >> k for k in range(steps.bit_length()))
    return frozenset((0, steps, *between))


def survivors(ended: Sequence[Checkpoint], n: int) -> list[Setting]:
    """The `n` most promising settings of a round by its last checkpoints, and the undamaged one that fits best.

    Where nothing is left to recover, the dev score is noise; the best fit is there so that the attack still works.
    """
    kept = sorted(ended, key=lambda c: c.promise, reverse=True)[:n]
    fitting = [c for c in ended if c.promise[0] and c.health.fitted is not None]
    kept += sorted(fitting, key=lambda c: (c.health.fitted, c.dev), reverse=True)[:1]
    return list(dict.fromkeys(c.setting for c in kept))


def choose(search: Search) -> Checkpoint:
    """Among the best checkpoint of each source the healthy one with the highest dev score, if it can be believed.

    A source that recovers much more (0.1) on dev, but only with a broken model, is reported instead, unhealthy: an
    attack that stayed healthy because it did little is no evidence that nothing was there.
    """
    best = [max(found, key=lambda c: c.rank) for found in search.best.values()]
    quiet = max(best, key=lambda c: c.rank)
    loud = [c for c in best if c.dev > quiet.dev + LOUD]
    return max([quiet, *loud], key=lambda c: c.dev)
