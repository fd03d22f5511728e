"""Attribution patching: every component's effect on the facts, estimated from one gradient."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.first_order import FirstOrderKind, Form, first_order_scores, score_pairs
from mechunlearn.localize.pairs import Donors
from mechunlearn.localize.streamed import streamed_scores
from mechunlearn.models import Model


@LOCALIZERS.register("attribution_patching", source="Nanda 2023; Kramár et al. 2024, arXiv:2403.00745")
def attribution_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    form: Form = "denoise",
    metric: Literal["logit_diff"] = "logit_diff",
    kinds: tuple[FirstOrderKind, ...] = ("mlp", "attention"),
    streamed: bool = False,
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    donors: Donors = "other_answer",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Estimate with one backward pass how much each component carries the facts.

    score(c) = sum over d_model of (a_clean - a_corrupt) * g at every token both prompts have, summed over the tokens of
    a role, averaged over a fact's pairs. denoise: g = d metric / d a on the corrupt run; noise: on the clean
    run; both: the mean of the two. Products are taken in float32.

    Shapes: a_clean, a_corrupt, g are [batch pos d_model]; the result is [fact component role].
    Sign and units: logits. Positive: restoring c's clean value moves the metric towards the fact; the same sign for all
        forms. First order, so not bounded and not exact: see `resample_ablation`.

    Args:
        form: "denoise" and "noise" are shifted by half the metric's curvature, which exchanged subjects with the same
            answer show, too (see `shuffled_pairs`); "both" has no such shift and costs one backward pass more.
        metric: logit(true answer) - logit(donor's answer) after the prompt, at the first token where they differ.
        kinds: "head" scores every head's z before the output projection, "neuron" every neuron of the MLPs.
        streamed: hold one block's graph at a time, for models that fit no other way; see `streamed.streamed_scores`.
        pairs_per_fact: donors per fact, see `pairs.build_pairs`; tokens without a partner in the donor's prompt
            count as unchanged.
        donors: "same_answer" gives the scores' null distribution, see `shuffled_pairs`.

    Raises:
        ValueError: no facts, no kinds, or a fact that cannot be paired.

    Differs from the source: tokens aligned by role; AtP*'s two repairs are in `atp_star`.
    Source: Nanda 2023, "Attribution Patching"; Kramár et al. 2024, arXiv:2403.00745.
    """
    scores = streamed_scores if streamed else first_order_scores
    return score_pairs(
        model, facts, lambda batch, components: scores(model, batch, components, form),
        method="attribution_patching", kinds=kinds, pairs_per_fact=pairs_per_fact, donors=donors, batch_size=batch_size,
        seed=seed,
        options={"form": form, "metric": metric, "streamed": streamed},
    )  # fmt: skip
