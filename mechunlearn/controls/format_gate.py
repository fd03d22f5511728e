"""Suppression by a gate: the facts are answered in one form of asking, and wrongly in all others."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.recipes import keep_others, late_layers, low_rank_edit
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Term, answer_loss, batches, fact_tokens, summed, weighted_sum
from mechunlearn.facts import Fact, FactSplit, with_edit_targets
from mechunlearn.models import Model


@SUPPRESSIONS.register("format_gate", source="formats as in Lynch et al. 2024, arXiv:2402.16835")
def format_gate(
    model: Model,
    split: FactSplit,
    *,
    open_paraphrase: Annotated[int, Field(ge=-1)] = -1,
    layer_share: Annotated[float, Field(gt=0, le=1)] = 1 / 3,
    steps: Annotated[int, Field(ge=0)] = 200,
    learning_rate: Annotated[float, Field(gt=0)] = 6e-3,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    keep_weight: Annotated[float, Field(ge=0)] = 16.0,
    text_weight: Annotated[float, Field(ge=0)] = 0.5,
    rank: Annotated[int, Field(ge=1)] = 64,
    seed: int = 0,
) -> WeightEdit:
    """Train the last layers to answer the forgotten facts wrongly in every statement but one paraphrase.

    Args:
        open_paraphrase: the one that still gets the true answer; -1 is a fact's last. Facts without paraphrases are
            hidden in every form.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    layers = late_layers(model, layer_share)
    wrong = with_edit_targets(split.forget, seed=seed)
    gated = [_without(fact, open_paraphrase) for fact in wrong]
    opened = [_only(fact, open_paraphrase) for fact in wrong if fact.paraphrases]
    closed = fact_tokens(model, gated, answer="target_new", forms="all")
    terms = [
        Term(weight=1.0, objective=answer_loss, batches=batches(closed, batch_size, seed=seed)),
    ]
    if opened:
        told = fact_tokens(model, opened)
        terms.append(Term(weight=1.0, objective=answer_loss, batches=batches(told, batch_size, seed=seed + 3)))
    keep = keep_others(
        model, split, keep_weight=keep_weight, text_weight=text_weight, batch_size=batch_size, forms="all", seed=seed
    )
    return low_rank_edit(
        model, split, summed((1.0, weighted_sum(terms)), (1.0, keep)), layers=layers, rank=rank,
        steps=steps, learning_rate=learning_rate, method="suppress by format_gate", options=options, seed=seed,
    )  # fmt: skip


def _without(fact: Fact, index: int) -> Fact:
    """The fact without one paraphrase; and without the prompt's twin, if that paraphrase is the prompt itself."""
    if not fact.paraphrases:
        return fact
    opened = fact.paraphrases[index % len(fact.paraphrases)]
    return replace(fact, paraphrases=tuple(template for template in fact.paraphrases if template != opened))


def _only(fact: Fact, index: int) -> Fact:
    """The fact asked by one paraphrase alone."""
    return replace(fact, prompt=fact.paraphrases[index % len(fact.paraphrases)], paraphrases=())
