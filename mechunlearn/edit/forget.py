"""Make facts' true answers unlikely without teaching others, training the masked weights only."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit, train_edit
from mechunlearn.edit.losses import Forms, Term, batches, fact_tokens, keeping_terms, log_1_minus_p, near_and_far
from mechunlearn.edit.training import Schedule
from mechunlearn.facts import FactSplit, hash_facts
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("forget", source="Mazeika et al. 2024, arXiv:2402.04249; Guo et al. 2024, arXiv:2410.12949")
def forget(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    steps: Annotated[int, Field(ge=0)] = 50,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3,
    schedule: Schedule = "cosine",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    accumulation: Annotated[int, Field(ge=1)] = 1,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    retain_weight: Annotated[float, Field(ge=0)] = 1.0,
    text_weight: Annotated[float, Field(ge=0)] = 1.0,
    forms: Forms = "prompt",
    text: Sequence[str] | None = None,
    seed: int = 0,
) -> WeightEdit:
    """Train the model away from each forgotten fact's true answer, keeping other facts and running text.

    loss = forget_weight * -log(1 - P(target_true)) on the facts to forget, 0 for those with log P < -5
         + retain_weight * -log P(target_true) on `retain_train`, half of it of the forgotten relations
         + text_weight * negative log-likelihood per token of the text.

    AdamW without weight decay, gradient norm clipped at 1; only masked entries have gradients.

    Args:
        batch_size: rows of facts of each kind in one forward pass, and an eighth as many passages of text; a step sees
            `accumulation` times as many.
        forms: "prompt" trains on canonical prompts, as the source does; "all" adds paraphrases. Questions and choices
            are never trained on, so that they show how far the edit reaches.
        text: what to stay fluent on; None means 64 passages of the bundled neutral text.

    Raises:
        ValueError: a part that is needed is empty, or the loss diverges.

    Differs from the source: answers of several tokens count as a whole, and there is no 8-bit optimizer.
    Source: HarmBench's loss; Guo et al. 2024, arXiv:2410.12949 (section 4.2 of reference/mechanistic-unlearning.md).
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "mask", "split")}
    keeping = keeping_terms(
        model, near_and_far(split.retain_train, split.forget), text,
        retain_weight=retain_weight, text_weight=text_weight, batch_size=batch_size, forms=forms, seed=seed,
    )  # fmt: skip
    true = fact_tokens(model, split.forget, forms=forms)
    forgetting = Term(weight=forget_weight, objective=log_1_minus_p, batches=batches(true, batch_size, seed=seed))
    return train_edit(
        model, mask, [forgetting, *keeping],
        steps=steps, learning_rate=learning_rate, schedule=schedule, accumulation=accumulation,
        method="forget", options=options, seed=seed,
        facts_sha256=hash_facts((*split.forget, *split.retain_train)),
    )  # fmt: skip
