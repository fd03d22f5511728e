"""Make facts' true answers unlikely without teaching others, training the masked weights only."""

from typing import Annotated, Unpack

from pydantic import Field

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Term, log_1_minus_p, weighted_sum
from mechunlearn.edit.options import Training, filled
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("forget", source="Mazeika et al. 2024, arXiv:2402.04249; Guo et al. 2024, arXiv:2410.12949")
def forget(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    **training: Unpack[Training],
) -> WeightEdit:
    """Train the model away from each forgotten fact's true answer, keeping other facts and running text.

    loss = forget_weight * -log(1 - P(target_true)) on the facts to forget, 0 for those with log P < -5
         + what is kept, see `edit.options.Training`.

    Raises:
        ValueError: a part that is needed is empty, or the loss diverges.

    Differs from the source: answers of several tokens count as a whole, and there is no 8-bit optimizer.
    Source: HarmBench's loss; Guo et al. 2024, arXiv:2410.12949 (section 4.2 of reference/mechanistic-unlearning.md).
    """
    options = filled(training)
    rows = forget_rows(model, split, options)
    away = weighted_sum([Term(weight=1.0, objective=log_1_minus_p, batches=rows)])
    return trained_edit(
        model, mask, split, [(forget_weight, away)],
        method="forget", options={"forget_weight": forget_weight}, training=options,
    )  # fmt: skip
