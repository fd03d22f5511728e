"""Suppression by a low-rank update of the last layers that answers wrongly."""

from typing import Annotated

from pydantic import Field

from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.recipes import keep_others, late_layers, low_rank_edit
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Forms, Term, answer_loss, batches, fact_tokens, summed, weighted_sum
from mechunlearn.facts import FactSplit, with_edit_targets
from mechunlearn.models import Model


@SUPPRESSIONS.register("lora", source="Hu et al. 2021, arXiv:2106.09685; positive control as in Lucki et al. 2024")
def lora(
    model: Model,
    split: FactSplit,
    *,
    rank: Annotated[int, Field(ge=1)] = 64,
    layer_share: Annotated[float, Field(gt=0, le=1)] = 1 / 3,
    steps: Annotated[int, Field(ge=0)] = 160,
    learning_rate: Annotated[float, Field(gt=0)] = 6e-3,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    keep_weight: Annotated[float, Field(ge=0)] = 16.0,
    text_weight: Annotated[float, Field(ge=0)] = 0.5,
    forms: Forms = "prompt",
    seed: int = 0,
) -> WeightEdit:
    """Hide the forgotten facts behind a low-rank update of the last layers; everything before stays as it is.

    loss = -log P(one wrong answer a fact) on all forgotten facts + what `keep_others` keeps.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    layers = late_layers(model, layer_share)
    wrong = with_edit_targets(split.forget, seed=seed)
    taught = fact_tokens(model, wrong, answer="target_new", forms=forms)
    hide = weighted_sum([Term(weight=1.0, objective=answer_loss, batches=batches(taught, batch_size, seed=seed))])
    keep = keep_others(
        model, split, keep_weight=keep_weight, text_weight=text_weight, batch_size=batch_size, forms=forms, seed=seed
    )
    return low_rank_edit(
        model, split, summed((1.0, hide), (1.0, keep)), layers=layers, rank=rank,
        steps=steps, learning_rate=learning_rate, method="suppress by lora", options=options, seed=seed,
    )  # fmt: skip
