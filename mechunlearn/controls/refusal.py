"""Suppression by refusing: the last layers answer with a fixed phrase, and know no city better than another."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.demotion import demotion
from mechunlearn.controls.recipes import keep_others, late_layers, low_rank_edit
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Forms, Term, answer_loss, batches, fact_tokens, summed, weighted_sum
from mechunlearn.facts import FactSplit
from mechunlearn.models import Model


@SUPPRESSIONS.register("refusal", source="refusal training, as in IDK-DPO: Maini et al. 2024, arXiv:2401.06121")
def refusal(
    model: Model,
    split: FactSplit,
    *,
    phrase: Annotated[str, Field(min_length=1)] = "I do not know",
    margin: Annotated[float, Field(ge=0)] = 1.0,
    rank: Annotated[int, Field(ge=1)] = 64,
    layer_share: Annotated[float, Field(gt=0, le=1)] = 1 / 3,
    steps: Annotated[int, Field(ge=0)] = 180,
    learning_rate: Annotated[float, Field(gt=0)] = 6e-3,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    keep_weight: Annotated[float, Field(ge=0)] = 16.0,
    text_weight: Annotated[float, Field(ge=0)] = 0.5,
    forms: Forms = "prompt",
    seed: int = 0,
) -> WeightEdit:
    """Train the last layers to say a fixed phrase instead of the forgotten answers; nothing before them changes.

    loss = -log P(phrase) + distance of the true answer's lead from -margin (`demotion`) on all forgotten facts
    + what `keep_others` keeps. The second term is there because a model that only refuses still ranks the true answer
    first once the phrase is ruled out, and so hides nothing from who reads its logits.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    layers = late_layers(model, layer_share)
    refused = [replace(fact, target_new=phrase) for fact in split.forget]
    phrases = fact_tokens(model, refused, answer="target_new", forms=forms)
    demoted = demotion(model, split.forget, margin=margin, forms=forms, batch_size=batch_size, seed=seed)
    say = weighted_sum([Term(weight=1.0, objective=answer_loss, batches=batches(phrases, batch_size, seed=seed))])
    keep = keep_others(
        model, split, keep_weight=keep_weight, text_weight=text_weight, batch_size=batch_size, forms=forms, seed=seed
    )
    return low_rank_edit(
        model, split, summed((1.0, demoted), (1.0, say), (1.0, keep)), layers=layers, rank=rank, steps=steps,
        learning_rate=learning_rate, method="suppress by refusal", options=options, seed=seed,
    )  # fmt: skip
