"""Overwrite facts with wrong answers, training the masked weights only."""

from typing import Annotated, Unpack

from pydantic import Field

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Term, answer_loss, weighted_sum
from mechunlearn.edit.options import Training, filled
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("inject", source="Guo et al. 2024; arXiv:2410.12949")
def inject(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    inject_weight: Annotated[float, Field(ge=0)] = 1.0,
    **training: Unpack[Training],
) -> WeightEdit:
    """Train the model to give each forgotten fact's `target_new`, keeping other facts and running text.

    loss = inject_weight * -log P(target_new) on the facts to forget + what is kept, see `edit.options.Training`.

    Raises:
        ValueError: a fact to forget has no `target_new`, a part that is needed is empty, or the loss diverges.

    Differs from the source: answers of several tokens count as a whole, and there is no 8-bit optimizer.
    Source: Guo et al. 2024, arXiv:2410.12949 (section 4.2 of reference/mechanistic-unlearning.md).
    """
    options = filled(training)
    rows = forget_rows(model, split, options, answer="target_new")
    wrong = weighted_sum([Term(weight=1.0, objective=answer_loss, batches=rows)])
    return trained_edit(
        model, mask, split, [(inject_weight, wrong)],
        method="inject", options={"inject_weight": inject_weight}, training=options,
    )  # fmt: skip
