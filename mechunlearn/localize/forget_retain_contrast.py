"""Weights that the facts to forget are sensitive to, and those to keep are not."""

import random
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


@LOCALIZERS.register("forget_retain_contrast", source="Foster et al. 2023, arXiv:2308.07707; contrasts are ours")
def forget_retain_contrast(
    model: Model,
    facts: Sequence[Fact],
    *,
    retain: Sequence[Fact] | None = None,
    contrast: Literal["share", "log", "ratio"] = "share",
    metric: WeightMetric = "logit_diff",
    kinds: tuple[Kind, ...] = ("mlp", "attention"),
    normalize: Normalize = "mean",
    max_retain: Annotated[int, Field(ge=1)] = 256,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Compare each component's squared gradients (see `fisher`) on the facts with those on retained facts.

    With F(f, c) of a fact and R(c) the mean over retained facts:
    share: F(f, c) / sum over components of F(f, .) - R(c) / sum over components of R;
    log: log F(f, c) - log R(c);   ratio: F(f, c) / R(c).

    Shapes: [fact component 1]; the only role is "all".
    Sign and units: share: in [-1, 1], sums to 0; log: nats; ratio: at least 0, 1 is no difference. Positive (share,
        log): the component matters more for these facts than for those to keep.

    Args:
        retain: facts to keep; a run gives its `retain_train`.
        contrast: "ratio" is what the literature divides by. It did harm on planted facts (mostly later ranks than F
            alone), for a component that hardly matters to either side can have any ratio. "log" tames its outliers, but
            for one fact it orders components just as the ratio does. "share", the default, is small where both sides
            are small, and cancels what every prompt uses, such as the first MLP.
        metric: "logit_diff" weighs facts alike; see `fisher`.
        normalize: "mean" or "sum" over the weights, see `gradient_norm`; it matters for "share" alone.
        max_retain: at most so many retained facts, drawn with the seed.

    Raises:
        ValueError: no facts to keep, a component without any gradient on them (log, ratio), no kinds, or what `fisher`
            refuses.

    Differs from the source: of components, not single weights; per fact to forget.
    Source: Foster et al. 2023, arXiv:2308.07707 (selective synaptic dampening: ratio of Fisher diagonals).
    """
    if not retain:
        raise ValueError("forget_retain_contrast: got no facts to retain, allowed: at least one; give `retain`")
    kept = sorted(retain, key=lambda fact: fact.key)
    if len(kept) > max_retain:
        kept = random.Random(seed).sample(kept, max_retain)

    def squares(listed: Sequence[Fact]) -> ComponentScores:
        return weight_scores(
            model, listed, "squared", method="forget_retain_contrast",
            sign=f"squared gradients, forget against retain ({contrast}); larger: matters more to forget",
            kinds=kinds, metric=metric, normalize=normalize, batch_size=batch_size, seed=seed,
            options={"contrast": contrast, "max_retain": max_retain},
        )  # fmt: skip

    scores, keep = squares(facts), squares(kept).per_fact[:, :, 0].mean(axis=0)
    forget = scores.per_fact[:, :, 0]
    if not (forget.sum(axis=1) > 0).all() or not (keep.sum() if contrast == "share" else keep.min()) > 0:
        raise ValueError("forget_retain_contrast: got gradients that are exactly 0, allowed: some for every fact and "
                         "component; take metric 'logit_diff' and contrast 'share'")  # fmt: skip
    if contrast == "share":
        values = forget / forget.sum(axis=1, keepdims=True) - keep / keep.sum()
    elif contrast == "ratio":
        values = forget / keep
    else:  # a floor far below any rounding error, for a single weight of one fact may have no gradient at all
        values = np.log(np.maximum(forget, np.finfo(float).tiny)) - np.log(keep)
    notes = {"n_retain": len(kept), "forget": forget.mean(axis=0).tolist(), "retain": keep.tolist()}
    return replace(scores, per_fact=values[:, :, None], notes=notes)
