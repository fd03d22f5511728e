"""Unlearning by weight masking: learn which of the masked weights to set to zero, and change no other."""

from typing import Annotated, Any, Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.budget import Budget, watched_and_retained
from mechunlearn.edit.edits import WeightEdit, values_in
from mechunlearn.edit.losses import Term, answer_loss, log_1_minus_p, weighted_sum
from mechunlearn.edit.options import Training, filled
from mechunlearn.edit.pruning import clamp, gated_trainable, prune
from mechunlearn.edit.trained import forget_rows, whole_loss
from mechunlearn.edit.training import Forward, train
from mechunlearn.facts import FactSplit, hash_facts
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


class GateTraining(Training, total=False):
    """`Training` of gates: a step of `learning_rate` is a share of a weight, not an amount."""

    learning_rate: Annotated[float, Field(gt=0, default=0.05)]


@EDITORS.register("weight_mask", source="Guo et al. 2024, arXiv:2410.12949")
def weight_mask(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    objective: Literal["inject", "forget"] = "inject",
    objective_weight: Annotated[float, Field(ge=0)] = 1.0,
    l1: Annotated[float, Field(ge=0)] = 1.0,
    n_pruned: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=0)] = 0.05,
    **training: Unpack[GateTraining],
) -> WeightEdit:
    """Train a gate in [0, 1] for each masked weight, then set the weights of the lowest gates to 0 and no others.

    loss = objective_weight * (-log P(target_new), or -log(1 - P(target_true)) as in `forget`) on the facts to forget
         + l1 * (1 - mean gate) + what is kept, see `edit.options.Training`

    with W' = gate * W. Gates start at 1, where the model is the original, and are clamped after each step. No
    weight gets a new value of its own: the edit can only take away.

    Args:
        objective: of the gates' training: "inject" needs a `target_new`.
        l1: price in nats of removing all masked weights.
        n_pruned: how many weights are zeroed, exactly: a share of the masked ones (float) or a number (int). With
            `max_damage` at most so many, as many as it allows.

    Raises:
        ValueError: more to prune than masked, a `rank`, a part that is needed is empty, or the loss diverges.

    Differs from the source: AdamW, not SGD with momentum; gates are trained, not weights between 0 and their value; the
        L1 term is a mean with a weight of its own, not relative to its first value; -log(1 - P) is offered, too.
    Source: Guo et al. 2024, arXiv:2410.12949, weight masking (5.3 of reference/mechanistic-unlearning.md).
    """
    options = filled(training, GateTraining)
    n = _number(n_pruned, mask.n_selected)
    if options["rank"] is not None:
        raise ValueError(f"weight_mask: got rank {options['rank']}, allowed: none, gates have no rank; leave it out")
    inject = objective == "inject"
    rows = forget_rows(model, split, options, answer="target_new" if inject else "target_true")
    away = weighted_sum([Term(weight=1.0, objective=answer_loss if inject else log_1_minus_p, batches=rows)])
    trainable = gated_trainable(model, mask)
    gates = trainable.leaves

    def removed(_: int, __: Forward) -> Tensor:
        return torch.stack([(1 - gate).sum() for gate in gates.values()]).sum() / mask.n_selected

    history = train(
        model, trainable, whole_loss(
            model, split, [(objective_weight, away), (l1, removed)], options, method="weight_mask"
        ),
        steps=options["steps"], learning_rate=options["learning_rate"], schedule=options["schedule"],
        accumulation=options["accumulation"], prefix_cache_gb=options["prefix_cache_gb"],
        checkpoint=options["checkpoint"], on_step=lambda _: clamp(trainable),
    )  # fmt: skip
    limit = options["max_damage"]
    watched, _ = watched_and_retained(split, limit)
    watch = Budget.of(model, trainable, watched, limit=limit, steps=1) if limit and gates else None
    notes = prune(trainable, n, watch, seed=options["seed"])
    own: dict[str, Any] = {
        "objective": objective, "objective_weight": objective_weight, "l1": l1, "n_pruned": n_pruned
    }  # fmt: skip
    return WeightEdit(
        values=values_in(model, mask, trainable.overrides()), mask=mask, base_name=model.name,
        base_sha256=model.sha256, method="weight_mask", options={**own, **options}, seed=options["seed"],
        facts_sha256=hash_facts((*split.forget, *split.retain_train)), history=history, notes=notes,
    )  # fmt: skip


def _number(n_pruned: float | int, n_masked: int) -> int:
    """How many entries that is."""
    if isinstance(n_pruned, float) and 0 < n_pruned <= 1:
        return int(n_pruned * n_masked + 1e-6)  # 1/3 of 3 entries is one entry, whatever floats say
    if isinstance(n_pruned, float) or not 0 <= n_pruned <= n_masked:
        raise ValueError(
            f"weight_mask: got n_pruned {n_pruned}, allowed: a share up to 1.0, or 0 to {n_masked} weights"
        )
    return n_pruned
