"""Suppression by removing, right before the unembedding, what tells the candidate answers apart."""

from typing import Annotated

from pydantic import Field

from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.demotion import demotion
from mechunlearn.controls.recipes import keep_others, late_layers, low_rank_edit
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Forms, weighted_sum
from mechunlearn.facts import FactSplit
from mechunlearn.models import Model


@SUPPRESSIONS.register("answer_direction", source="Patil et al. 2023, arXiv:2309.17410 (head projection defence)")
def answer_direction(
    model: Model,
    split: FactSplit,
    *,
    rank: Annotated[int, Field(ge=1)] = 64,
    layer_share: Annotated[float, Field(gt=0, le=1)] = 1 / 3,
    steps: Annotated[int, Field(ge=0)] = 160,
    learning_rate: Annotated[float, Field(gt=0)] = 6e-3,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    margin: Annotated[float, Field(ge=0)] = 1.0,
    retain_weight: Annotated[float, Field(ge=0)] = 8.0,
    text_weight: Annotated[float, Field(ge=0)] = 0.5,
    forms: Forms = "prompt",
    seed: int = 0,
) -> WeightEdit:
    """Train a low-rank update of the last layers to take the true answer's direction out of forgotten questions.

    The direction is that of its unembedding vector against the mean of the other candidates'; these keep their order.
    loss = distance of the true answer's lead from -margin on all forgotten facts (see `demotion`) + retain_weight *
    -log P(target_true) on `retain_train` + text_weight * negative log-likelihood per token of neutral text.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    layers = late_layers(model, layer_share)
    demoted = demotion(model, split.forget, margin=margin, forms=forms, batch_size=batch_size, seed=seed)
    keep = weighted_sum(
        keep_others(
            model, split, retain_weight=retain_weight, text_weight=text_weight, batch_size=batch_size, forms=forms,
            seed=seed,
        )
    )  # fmt: skip
    return low_rank_edit(
        model, split, lambda step, forward: demoted(step, forward) + keep(step, forward), layers=layers, rank=rank,
        steps=steps, learning_rate=learning_rate, method="suppress by answer_direction", options=options, seed=seed,
    )  # fmt: skip
