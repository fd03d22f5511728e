"""Suppression by removing, right before the unembedding, what tells the candidate answers apart."""

from typing import Annotated

from pydantic import Field

from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.demotion import demotion
from mechunlearn.controls.recipes import keep_others, late_layers, low_rank_edit
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Forms, summed
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
    keep_weight: Annotated[float, Field(ge=0)] = 16.0,
    text_weight: Annotated[float, Field(ge=0)] = 0.5,
    forms: Forms = "prompt",
    seed: int = 0,
) -> WeightEdit:
    """Train a low-rank update of the last layers to take the true answer's direction out of forgotten questions.

    The direction is that of its unembedding vector against the mean of the other candidates'; these keep their order.
    loss = distance of the true answer's lead from -margin on all forgotten facts (see `demotion`) + what
    `keep_others` keeps.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    layers = late_layers(model, layer_share)
    demoted = demotion(model, split.forget, margin=margin, forms=forms, batch_size=batch_size, seed=seed)
    keep = keep_others(
        model, split, keep_weight=keep_weight, text_weight=text_weight, batch_size=batch_size, forms=forms, seed=seed
    )
    return low_rank_edit(
        model, split, summed((1.0, demoted), (1.0, keep)), layers=layers, rank=rank, steps=steps,
        learning_rate=learning_rate, method="suppress by answer_direction", options=options, seed=seed,
    )  # fmt: skip
