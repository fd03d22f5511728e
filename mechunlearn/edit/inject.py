"""Overwrite facts with wrong answers, training the masked weights only."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit, train_edit
from mechunlearn.edit.losses import Forms, Term, answer_loss, batches, fact_tokens, keeping_terms, near_and_far
from mechunlearn.edit.training import Schedule
from mechunlearn.facts import FactSplit, hash_facts
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("inject", source="Guo et al. 2024; arXiv:2410.12949")
def inject(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    steps: Annotated[int, Field(ge=0)] = 50,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3,
    schedule: Schedule = "cosine",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    accumulation: Annotated[int, Field(ge=1)] = 1,
    inject_weight: Annotated[float, Field(ge=0)] = 1.0,
    retain_weight: Annotated[float, Field(ge=0)] = 1.0,
    text_weight: Annotated[float, Field(ge=0)] = 1.0,
    forms: Forms = "prompt",
    text: Sequence[str] | None = None,
    seed: int = 0,
) -> WeightEdit:
    """Train the model to give each forgotten fact's `target_new`, keeping other facts and running text.

    loss = inject_weight * -log P(target_new) on the facts to forget
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
        ValueError: a fact to forget has no `target_new`, a part that is needed is empty, or the loss diverges.

    Differs from the source: answers of several tokens count as a whole, and there is no 8-bit optimizer.
    Source: Guo et al. 2024, arXiv:2410.12949 (section 4.2 of reference/mechanistic-unlearning.md).
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "mask", "split")}
    keeping = keeping_terms(
        model, near_and_far(split.retain_train, split.forget), text,
        retain_weight=retain_weight, text_weight=text_weight, batch_size=batch_size, forms=forms, seed=seed,
    )  # fmt: skip
    wrong = fact_tokens(model, split.forget, answer="target_new", forms=forms)
    injecting = Term(weight=inject_weight, objective=answer_loss, batches=batches(wrong, batch_size, seed=seed))
    return train_edit(
        model, mask, [injecting, *keeping],
        steps=steps, learning_rate=learning_rate, schedule=schedule, accumulation=accumulation,
        method="inject", options=options, seed=seed,
        facts_sha256=hash_facts((*split.forget, *split.retain_train)),
    )  # fmt: skip
