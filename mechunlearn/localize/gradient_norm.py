"""Gradient norm: how steeply the facts depend on a component's weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mechunlearn.components import ComponentScores, Kind
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.weight_gradients import Normalize, WeightMetric, weight_scores
from mechunlearn.models import Model


@LOCALIZERS.register("gradient_norm", source="Lee et al. 2023, arXiv:2210.11466; Fan et al. 2024, arXiv:2310.12508")
def gradient_norm(
    model: Model,
    facts: Sequence[Fact],
    *,
    norm: Literal["l2", "l1"] = "l2",
    metric: WeightMetric = "logit_diff",
    kinds: tuple[Kind, ...] = ("mlp", "attention"),
    normalize: Normalize = "mean",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Norm of each fact's gradient of the metric with respect to a component's weights, averaged over facts.

    l2: sqrt(mean over the weights of g^2); l1: mean over the weights of |g|; with normalize "sum" the sums in place
    of the means, so that squares (l2) or values (l1) add up over components.

    Shapes: [fact component 1]; the only role is "all", for weights are shared by all tokens.
    Sign and units: the metric's (logits or nats) per unit of weight, at least 0: how much, not in which direction.

    Args:
        metric: "logit_diff" weighs facts alike; under "log_prob" facts that the model is sure of have no gradient left.
        normalize: "mean" is the default, for components compete for a budget of parameters, and an MLP must not win by
            having more of them. Components of one kind have as many weights each, and their order is the same either
            way.
        seed: of the wrong answer that "logit_diff" compares with.

    Raises:
        ValueError: no facts, no kinds, or for "logit_diff" a fact without a wrong answer.

    Differs from the sources: every fact's own norm, then the mean; they take the norm of the batch's mean gradient, in
        which facts cancel.
    Source: Lee et al. 2023, arXiv:2210.11466 (relative gradient norm); Fan et al. 2024, arXiv:2310.12508 (saliency).
    """
    scores = weight_scores(
        model, facts, "squared" if norm == "l2" else "absolute", method="gradient_norm",
        sign="norm of the metric's gradient, at least 0; larger: a small change moves the answer more",
        kinds=kinds, metric=metric, normalize=normalize, batch_size=batch_size, seed=seed, options={"norm": norm},
    )  # fmt: skip
    return replace(scores, per_fact=np.sqrt(scores.per_fact)) if norm == "l2" else scores
