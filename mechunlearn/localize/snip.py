"""SNIP: what removing single weights would do to the facts, to first order."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.components import ComponentScores, Kind
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.weight_gradients import Normalize, WeightMetric, weight_scores
from mechunlearn.models import Model


@LOCALIZERS.register("snip", source="Lee et al. 2019, arXiv:1810.02340; Wei et al. 2024, arXiv:2402.05162")
def snip(
    model: Model,
    facts: Sequence[Fact],
    *,
    metric: WeightMetric = "logit_diff",
    kinds: tuple[Kind, ...] = ("mlp", "attention"),
    normalize: Normalize = "mean",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Mean over a component's weights of |w * d metric / d w|, for each fact by itself.

    |w g| is, to first order, how far the metric moves when that one weight is set to 0.

    Shapes: [fact component 1]; the only role is "all".
    Sign and units: the metric's (logits or nats), at least 0: how much, not in which direction.

    Args:
        metric: "logit_diff" weighs facts alike, see `fisher` for "log_prob".
        normalize: "mean" or "sum" over the weights, see `gradient_norm`.
        seed: of the wrong answer that "logit_diff" compares with.

    Raises:
        ValueError: no facts, no kinds, or for "logit_diff" a fact without a wrong answer.

    Differs from the sources: absolute values per fact, then the mean (as Wei et al.); Lee et al. take the absolute
        value of the batch's gradient and divide by the sum over all weights.
    Source: Lee et al. 2019, arXiv:1810.02340, equation 6; Wei et al. 2024, arXiv:2402.05162, section 3.
    """
    return weight_scores(
        model, facts, "saliency", method="snip",
        sign="|weight x gradient|, at least 0; larger: setting the weights to 0 moves the answer more",
        kinds=kinds, metric=metric, normalize=normalize, batch_size=batch_size, seed=seed,
    )  # fmt: skip
