"""Make facts' true answers unlikely by plain gradient ascent, training the masked weights only."""

from typing import Annotated, Unpack

from pydantic import Field

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Term, answer_loss, weighted_sum
from mechunlearn.edit.options import Unkept, filled
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("gradient_ascent", source="Jang et al. 2023, arXiv:2210.01504; GA of TOFU, Maini et al. 2024")
def gradient_ascent(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    **training: Unpack[Unkept],
) -> WeightEdit:
    """Train the model away from each forgotten fact's true answer, and by default keep nothing.

    loss = forget_weight * log P(target_true) on the facts to forget; what is kept weighs 0 unless it is given weights,
    see `edit.options.Training`; `gradient_difference` is this with weights.

    The loss has no lower bound: it falls without end, and takes with it whatever else those weights do. End it by few
    steps, a small learning rate or `max_damage`.

    Raises:
        ValueError: a part that is needed is empty, or the loss diverges to something that is no number.

    Differs from the source: summed over an answer's tokens, not averaged.
    Source: Jang et al. 2023, arXiv:2210.01504; Maini et al. 2024, arXiv:2401.06121 ("gradient ascent").
    """
    options = filled(training, Unkept)
    rows = forget_rows(model, split, options)
    ascent = weighted_sum([Term(weight=-1.0, objective=answer_loss, batches=rows)])
    return trained_edit(
        model, mask, split, [(forget_weight, ascent)],
        method="gradient_ascent", options={"forget_weight": forget_weight}, training=options,
    )  # fmt: skip
