"""What every trained editor does around its own loss: keep the rest, stay in the mask, end within a budget."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mechunlearn.edit.budget import Budget, watched_and_retained
from mechunlearn.edit.edits import WeightEdit, train_edit
from mechunlearn.edit.losses import (
    Loss,
    Tokens,
    batches,
    fact_tokens,
    keeping_terms,
    kl_loss,
    near_and_far,
    summed,
    weighted_sum,
)
from mechunlearn.edit.options import Filled
from mechunlearn.facts import Fact, FactSplit, hash_facts
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


def forget_rows(
    model: Model, split: FactSplit, training: Filled, *, answer: Literal["target_true", "target_new"] = "target_true"
) -> Iterator[Tokens]:
    """Endless batches of the facts to forget, with their true or their new answer as targets.

    Raises:
        ValueError: a fact without `target_new` where that is the answer.
    """
    tokens = fact_tokens(model, split.forget, answer=answer, forms=training["forms"])
    return batches(tokens, training["batch_size"], seed=training["seed"])


def whole_loss(
    model: Model, split: FactSplit, own: Sequence[tuple[float, Loss]], training: Filled, *, method: str
) -> Loss:
    """The method's own weighted losses plus the retain term and the text term.

    Raises:
        ValueError: nothing to retain, or every weight 0.
    """
    _, retained = watched_and_retained(split, training["max_damage"])
    parts = (*own, *_keep(model, retained, split.forget, training))
    if not any(weight for weight, _ in parts):
        raise ValueError(f"{method}: every loss weight is 0; make one of them positive")
    return summed(*parts)


def trained_edit(
    model: Model, mask: ParameterMask, split: FactSplit, own: Sequence[tuple[float, Loss]], *,
    method: str, options: Mapping[str, Any], training: Filled,
) -> WeightEdit:  # fmt: skip
    """Train the masked entries on the method's own weighted losses plus what keeps the rest; see `options.Training`.

    With `max_damage` some retained facts are set aside: they are watched, not trained on.

    Raises:
        ValueError: nothing to retain, every weight 0, or a loss that diverges.
    """
    limit = training["max_damage"]
    watched, _ = watched_and_retained(split, limit)
    return train_edit(
        model, mask, whole_loss(model, split, own, training, method=method),
        steps=training["steps"], learning_rate=training["learning_rate"], schedule=training["schedule"],
        accumulation=training["accumulation"], rank=training["rank"],
        prefix_cache_gb=training["prefix_cache_gb"], checkpoint=training["checkpoint"], method=method,
        options={**options, **training}, seed=training["seed"],
        facts_sha256=hash_facts((*split.forget, *split.retain_train)),
        budget=None if limit is None else lambda trainable: Budget.of(
            model, trainable, watched, limit=limit, steps=training["steps"]
        ),
    )  # fmt: skip


def _keep(model: Model, retained: Sequence[Fact], forget: Sequence[Fact], training: Filled) -> list[tuple[float, Loss]]:
    """The retain term and the text term, each of its weight."""
    size, seed = training["batch_size"], training["seed"]
    near = near_and_far(retained, forget)
    by_kl = training["retain_loss"] == "kl" and training["retain_weight"] > 0
    terms = keeping_terms(
        model, near, training["text"], retain_weight=0.0 if by_kl else training["retain_weight"],
        text_weight=training["text_weight"], batch_size=size, forms=training["forms"], seed=seed,
    )  # fmt: skip
    losses: list[tuple[float, Loss]] = [(1.0, weighted_sum(terms))] if terms else []
    if by_kl:
        rows = batches(fact_tokens(model, near, forms=training["forms"]), size, seed=seed + 1)
        losses.append((training["retain_weight"], kl_loss(model, rows)))
    return losses
