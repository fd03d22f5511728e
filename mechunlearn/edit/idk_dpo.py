"""Direct preference optimisation of a refusal over the true answer, training the masked weights only."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Unpack

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import batches, fact_tokens, joined, log_ratios
from mechunlearn.edit.options import Training, filled
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.edit.training import Forward
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model

REFUSALS = ("I do not know", "I am not sure", "that is not known to me", "no one has told me")


def dpo_loss(
    preferred: Float[Tensor, " row"], rejected: Float[Tensor, " row"], beta: float
) -> Float[Tensor, ""]:  # fmt: skip
    """-log sigmoid(beta * (preferred - rejected)) of two log-ratios to the original, averaged over rows.

    Nats; log 2 at the original.
    """
    return -F.logsigmoid(beta * (preferred - rejected)).mean()


@EDITORS.register("idk_dpo", source="Rafailov et al. 2023, arXiv:2305.18290; IDK of TOFU, Maini et al. 2024")
def idk_dpo(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    beta: Annotated[float, Field(gt=0)] = 0.1,
    refusals: Annotated[Sequence[str], Field(min_length=1)] = REFUSALS,
    **training: Unpack[Training],
) -> WeightEdit:
    """Train the model to prefer saying that it does not know to each forgotten fact's true answer.

    loss = forget_weight * -log sigmoid(beta * (log(P(refusal) / P0(refusal)) - log(P(target_true) / P0(target_true))))
           on the facts to forget, both after the same prompt, P0 of the unedited model, + what is kept, see
           `edit.options.Training`.

    Args:
        beta: how soon a preference counts as learnt.
        refusals: what to say instead, without leading space; one is drawn for each fact.

    Raises:
        ValueError: no refusals, a part that is needed is empty, or the loss diverges.

    Differs from the source: a few phrases in place of TOFU's 100, drawn once a fact, not once a step; running text is
        kept, too.
    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; Maini et al. 2024, arXiv:2401.06121 ("IDK").
    """
    if not refusals:
        raise ValueError("idk_dpo: got no refusals, allowed: one phrase or more; give some, or leave the option out")
    options = filled(training)
    rng = random.Random(options["seed"])
    refused = [replace(fact, target_new=rng.choice(refusals)) for fact in split.forget]
    phrases = fact_tokens(model, refused, answer="target_new", forms=options["forms"])
    # drawn with the seed of `forget_rows`, so that each batch has both continuations of the same prompts
    rows = joined(
        batches(phrases, options["batch_size"], seed=options["seed"]), forget_rows(model, split, options)
    )  # fmt: skip

    def prefer(_: int, forward: Forward) -> Tensor:
        preferred, rejected = log_ratios(model, forward, next(rows)).chunk(2)
        return dpo_loss(preferred, rejected, beta)

    return trained_edit(
        model, mask, split, [(forget_weight, prefer)], method="idk_dpo",
        options={"forget_weight": forget_weight, "beta": beta, "refusals": list(refusals)}, training=options,
    )  # fmt: skip
