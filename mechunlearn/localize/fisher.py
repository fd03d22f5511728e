"""Empirical Fisher information: which weights the facts' probabilities are sensitive to."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.components import ComponentScores, Kind
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.weight_gradients import Normalize, WeightMetric, weight_scores
from mechunlearn.models import Model


@LOCALIZERS.register("fisher", source="Kirkpatrick et al. 2017, arXiv:1612.00796; Foster et al. 2023, arXiv:2308.07707")
def fisher(
    model: Model,
    facts: Sequence[Fact],
    *,
    metric: WeightMetric = "log_prob",
    kinds: tuple[Kind, ...] = ("mlp", "attention"),
    normalize: Normalize = "mean",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Diagonal empirical Fisher of each component's weights: mean over facts of squared per-fact gradients.

    score(c) = mean over c's weights of (d log P(true answer | prompt) / d w)^2, one fact at a time, never the square of
    a batch's gradient, in which facts cancel.

    Shapes: [fact component 1]; the only role is "all".
    Sign and units: squared nats (or logits) per squared unit of weight, at least 0; with normalize "sum" the Fisher
        matrix' trace over the component.

    Args:
        metric: "log_prob" is Fisher's. It weighs facts by how unsure the model is of them: of an answer with
            P = 0.999 next to nothing is left, and a set of well-known facts is decided by its least known ones;
            "logit_diff" weighs them alike.
        normalize: see `gradient_norm`.
        seed: of the wrong answer that "logit_diff" compares with.

    Raises:
        ValueError: no facts, no kinds, or for "logit_diff" a fact without a wrong answer.

    Differs from the sources: summed over components; only the fact's true answer is differentiated (empirical Fisher),
        not answers drawn from the model.
    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, section 2; Foster et al. 2023, arXiv:2308.07707.
    """
    return weight_scores(
        model, facts, "squared", method="fisher",
        sign="squared gradient, at least 0; larger: the answer is more sensitive to these weights",
        kinds=kinds, metric=metric, normalize=normalize, batch_size=batch_size, seed=seed,
    )  # fmt: skip
