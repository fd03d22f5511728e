"""The experiment of relearning: an attacker trains the model through a guard, or without it, and asks through it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechunlearn.attack.relearning import relearning
from mechunlearn.attack.relearning_data import Source
from mechunlearn.bench.guard_ground import Found, Ground
from mechunlearn.features.attached import Seen, attached
from mechunlearn.features.guard import Guard
from mechunlearn.features.hook_points import place_of_hook
from mechunlearn.models import Model

# pandas has no complete types
# pyright: standard


def relearned(ground: Ground) -> Found:
    """An attacker trains the model on the topic's facts that it has; x is 0 before and 1 after.

    P(true) of the facts that it does not have, at the checkpoint that it chooses by asking for a few others. Of every
    guard three arms, all asked through it, by its name: trained through it, too; "..., trained without": trained
    without the guard, that is put on for the questions; "..., other text": likewise, on text without the topic's facts,
    which tells what of it any training does. "removed": trained and asked without a guard; who takes it off needs no
    training.
    """
    yield from _relearned(ground, "removed", nullcontext(), "shown")
    for name in ("static", "dsg", "share"):
        guard = ground.guard(name)
        yield from _relearned(ground, name, ground.inside(guard), "shown")
        yield from _relearned(ground, f"{name}, trained without", only_asked(ground.model, guard), "shown")
        yield from _relearned(ground, f"{name}, other text", only_asked(ground.model, guard), "unrelated")


def _relearned(ground: Ground, arm: str, guarded: AbstractContextManager[object], source: Source) -> Found:
    quick: dict[str, Any] = {"kinds": ("full",), "learning_rates": (3e-4, 1e-3), "steps": 40, "seed": ground.seed}
    with guarded:
        yield arm, 0.0, {"hidden": ground.p_true(ground.split.forget_hidden)}
        result = relearning(ground.model, ground.split, sources=(source,), **quick)
        yield arm, 1.0, {"hidden": float(np.mean(list(result.hidden_scores().values())))}


@contextmanager
def only_asked(model: Model, guard: Guard) -> Iterator[None]:
    """Inside, a guard acts on forward passes without gradients, which ask, and not on those of training."""
    change = guard.change(model.device)

    def asked(x: Tensor, seen: Seen) -> Tensor:
        return x if torch.is_grad_enabled() else change(x, seen)

    with attached(model, place_of_hook(model, guard.dictionary.hook_point), asked):
        yield
