"""Gradient ascent on the facts to forget and descent on what is kept, training the masked weights only."""

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


@EDITORS.register(
    "gradient_difference", source="Liu et al. 2022, arXiv:2203.12817; GradDiff of TOFU, Maini et al. 2024"
)
def gradient_difference(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    **training: Unpack[Training],
) -> WeightEdit:
    """Train the model away from each forgotten fact's true answer, keeping other facts and running text.

    loss = forget_weight * log P(target_true) on the facts to forget + what is kept, see `edit.options.Training`.

    The first term has no lower bound and outgrows the others in the end: it needs few steps, a small learning rate or
    `max_damage`.

    Raises:
        ValueError: a part that is needed is empty, or the loss diverges to something that is no number.

    Differs from the source: summed over an answer's tokens, not averaged; running text is kept, too.
    Source: Liu et al. 2022, arXiv:2203.12817; Maini et al. 2024, arXiv:2401.06121 ("gradient difference").
    """
    options = filled(training)
    rows = forget_rows(model, split, options)
    ascent = weighted_sum([Term(weight=-1.0, objective=answer_loss, batches=rows)])
    return trained_edit(
        model, mask, split, [(forget_weight, ascent)],
        method="gradient_difference", options={"forget_weight": forget_weight}, training=options,
    )  # fmt: skip
