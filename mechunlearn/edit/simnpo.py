"""SimNPO: NPO by the answer's mean log-probability, without a reference model, training the masked weights only."""

from typing import Annotated, Unpack

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import answer_log_probs, predict
from mechunlearn.edit.options import Training, filled
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.edit.training import Forward
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


def simnpo_loss(
    log_p: Float[Tensor, " row"], n_tokens: Int[Tensor, " row"], beta: float, gamma: float
) -> Float[Tensor, ""]:
    """-(2 / beta) log sigmoid(-beta log_p / n_tokens - gamma), averaged over rows. Nats; at least 0."""
    return -2 / beta * F.logsigmoid(-beta * log_p / n_tokens - gamma).mean()


@EDITORS.register("simnpo", source="Fan et al. 2024, arXiv:2410.07163")
def simnpo(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    beta: Annotated[float, Field(gt=0)] = 2.5,
    gamma: Annotated[float, Field(ge=0)] = 0.0,
    **training: Unpack[Training],
) -> WeightEdit:
    """Train true answers to be unlikely a token, the less strongly the less likely they are, whatever they were.

    loss = forget_weight * -(2 / beta) log sigmoid(-(beta / n) log P(target_true) - gamma) on the facts to forget, n the
           number of the answer's tokens, + what is kept, see `edit.options.Training`.

    Args:
        beta: how soon an answer counts as forgotten.
        gamma: margin: by how much beta times the mean log-probability of a token must be below 0 to count half.

    Raises:
        ValueError: a part that is needed is empty, or the loss diverges.

    Differs from the source: running text is kept, too.
    Source: Fan et al. 2024, arXiv:2410.07163.
    """
    options = filled(training)
    rows = forget_rows(model, split, options)

    def away(_: int, forward: Forward) -> Tensor:
        logits, tokens, counts = predict(forward, next(rows))
        return simnpo_loss(answer_log_probs(logits, tokens, counts), counts.sum(-1), beta, gamma)

    return trained_edit(
        model, mask, split, [(forget_weight, away)],
        method="simnpo", options={"forget_weight": forget_weight, "beta": beta, "gamma": gamma}, training=options,
    )  # fmt: skip
