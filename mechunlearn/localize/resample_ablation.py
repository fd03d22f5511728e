"""Exact ablation: what the model loses when an MLP's output is another subject's."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mechunlearn.activations import Place, untouched
from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.pairs import batches, build_pairs, describe_pairs
from mechunlearn.localize.patching import exchange
from mechunlearn.localize.scoring import exact_scores
from mechunlearn.models import Model, all_components

_ROLES = ("subject", "last")


@LOCALIZERS.register("resample_ablation", source="Chan et al. 2022; Zhang & Nanda 2023, arXiv:2309.16042")
def resample_ablation(
    model: Model,
    facts: Sequence[Fact],
    *,
    metric: Literal["logit_diff", "accuracy"] = "logit_diff",
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Measure exactly what each MLP carries: give it the output it has on another subject, see what is lost.

    score(m, role) = metric(clean run) - metric(clean run with m's output at the role's tokens taken from the donor's
    run). Two roles: all subject tokens at once, and the last token. This is `activation_patching` with form "noise" on
    MLPs; it has a name of its own because runs hold every localizer against it, whatever their settings say.

    Shapes: [fact component role].
    Sign and units: logits, or a share in [-1, 1] for accuracy. Positive: the MLP carries the fact. Exact, but effects
        of several MLPs or roles do not add up.

    Args:
        metric: "logit_diff": true answer against the donor's; "accuracy": 1 where the true answer beats all other
            candidates at the first token where the two answers differ.
        pairs_per_fact: donors per fact, see `pairs.build_pairs`.

    Raises:
        ValueError: no facts, or a fact that cannot be paired.

    Source: Chan et al. 2022, "Causal Scrubbing" (resampling); Zhang & Nanda 2023, arXiv:2309.16042 (symmetric).
    """
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, seed=seed)
    components = all_components(model, ("mlp",))
    places: list[Place] = [("mlp", component.layer) for component in components]
    with untouched(model), torch.no_grad():
        prepared = (exchange(model, batch, places, restore=False) for batch in batches(model, pairs, batch_size))
        per_fact, means = exact_scores(
            model, len(facts), prepared, components, _ROLES, metric=metric, batch_size=2 * batch_size
        )
    return ComponentScores(
        method="resample_ablation",
        metric=metric,
        sign="drop of the metric when the MLP's output is another subject's; positive: the MLP carries the fact",
        components=components,
        roles=_ROLES,
        per_fact=per_fact,
        options={"metric": metric, "pairs_per_fact": pairs_per_fact, "batch_size": batch_size, "seed": seed},
        facts_sha256=hash_facts(facts),
        notes={**describe_pairs(pairs), **means},
    )
