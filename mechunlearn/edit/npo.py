"""Negative preference optimisation: make true answers less likely than they were, training the masked weights only."""

from typing import Annotated, Unpack

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import log_ratios
from mechunlearn.edit.options import Training, filled
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.edit.training import Forward
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


def npo_loss(log_ratio: Float[Tensor, " row"], beta: float) -> Float[Tensor, ""]:
    """-(2 / beta) log sigmoid(-beta log_ratio), averaged over rows. Nats; 2 / beta * log 2 where no ratio has moved."""
    return -2 / beta * F.logsigmoid(-beta * log_ratio).mean()


@EDITORS.register("npo", source="Zhang et al. 2024, arXiv:2404.05868")
def npo(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    beta: Annotated[float, Field(gt=0)] = 0.1,
    **training: Unpack[Training],
) -> WeightEdit:
    """Train true answers to be less likely than in the original, the less strongly the less likely they already are.

    loss = forget_weight * -(2 / beta) log sigmoid(-beta log(P(target_true) / P0(target_true))) on the facts to forget,
           P0 of the unedited model, + what is kept, see `edit.options.Training`.

    Its gradient is gradient ascent's times 2 r^beta / (1 + r^beta), r the ratio of probabilities: 1 at the start, 0 in
    the limit. Unlike gradient ascent's the loss is at least 0.

    Args:
        beta: how soon a forgotten answer counts no more; towards 0 this is gradient ascent.

    Raises:
        ValueError: a part that is needed is empty, or the loss diverges.

    Differs from the source: running text is kept, too.
    Source: Zhang et al. 2024, arXiv:2404.05868.
    """
    options = filled(training)
    rows = forget_rows(model, split, options)

    def away(_: int, forward: Forward) -> Tensor:
        return npo_loss(log_ratios(model, forward, next(rows)), beta)

    return trained_edit(
        model, mask, split, [(forget_weight, away)],
        method="npo", options={"forget_weight": forget_weight, "beta": beta}, training=options,
    )  # fmt: skip
