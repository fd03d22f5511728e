"""Relevance patching: attribution patching with the gradient of layer-wise relevance propagation."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.backward_rules import RULES, Rule, relevance_rules
from mechunlearn.localize.first_order import FirstOrderKind, Form, first_order_scores, score_pairs
from mechunlearn.localize.pairs import Donors
from mechunlearn.localize.streamed import streamed_scores
from mechunlearn.models import Model


@LOCALIZERS.register("relevance_patching", source="Jafari et al. 2025 (RelP), arXiv:2508.21258")
def relevance_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    rules: tuple[Rule, ...] = RULES,
    form: Form = "denoise",
    kinds: tuple[FirstOrderKind, ...] = ("mlp", "attention"),
    streamed: bool = False,
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    donors: Donors = "other_answer",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Attribution patching in which norms and nonlinearities pass gradients as if they were linear.

    score(c) = sum over d_model of (a_clean - a_corrupt) * g, with g the gradient under `backward_rules`. The cost is
    that of attribution patching.

    Sign and units: as `attribution_patching`.

    Args:
        rules: which local derivatives are replaced; norms alone is the "norm-frozen" variant.
        streamed: hold one block's graph at a time, for models that fit no other way; see `streamed.streamed_scores`.

    Raises:
        ValueError: no facts, no kinds, or a fact that cannot be paired.
        NotSupported: a norm or an MLP that the rules do not cover.

    Differs from the source: the norms of all supported families are covered, Gemma's post-norms and Qwen3's norms of
        queries and keys among them; attention patterns keep their gradient.
    Source: Jafari et al. 2025, arXiv:2508.21258, section 3.
    """
    scores = streamed_scores if streamed else first_order_scores
    return score_pairs(
        model, facts, lambda batch, components: scores(model, batch, components, form),
        method="relevance_patching", kinds=kinds, pairs_per_fact=pairs_per_fact, donors=donors, batch_size=batch_size,
        seed=seed,
        rule=relevance_rules(model, rules), options={"rules": list(rules), "form": form, "streamed": streamed},
    )  # fmt: skip
