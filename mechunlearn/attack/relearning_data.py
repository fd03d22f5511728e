"""What a relearning attacker trains on: forgotten facts it knows, related ones that were kept, or unrelated text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mechunlearn.attack.health import TEXT_SEED
from mechunlearn.edit.losses import (
    Forms,
    Term,
    answer_loss,
    batches,
    fact_tokens,
    joined,
    text_loss,
    text_tokens,
    weighted_sum,
)
from mechunlearn.edit.training import Forward
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text

Source = Literal["shown", "related", "unrelated"]
N_PASSAGES = 256
ROWS_PER_PASSAGE = 4  # a passage is about as long as four prompts


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """One source of an attacker's training data."""

    source: Source
    own: tuple[Fact, ...]
    """The facts that training should fit; none for text."""
    loss: Callable[[], Callable[[int, Forward], Float[Tensor, ""]]]
    """A new loss for `train`, at the first of its seeded batches: every setting sees the same ones."""


def training_data(
    model: Model, split: FactSplit, source: Source, *, batch_size: int, retained_share: float, forms: Forms, seed: int
) -> TrainingData:
    """Prepare one source. Batches are drawn with `seed`; the passages of "unrelated" are drawn with it, too.

    Args:
        source: "shown" trains on `forget_shown`, "related" on `related_facts`, "unrelated" on neutral text that
            states no fact at all and is not the text health is measured on.
        retained_share: of the batch's rows, drawn from all of `retain_train`; not for "unrelated".

    Raises:
        ValueError: no facts for the source.
    """
    if source == "unrelated":
        passages = text_tokens(model, neutral_text(N_PASSAGES, seed=TEXT_SEED + 1 + abs(seed)))
        rows = max(1, batch_size // ROWS_PER_PASSAGE)

        def text() -> Callable[[int, Forward], Tensor]:
            return weighted_sum([Term(weight=1.0, objective=text_loss, batches=batches(passages, rows, seed=seed))])

        return TrainingData(source=source, own=(), loss=text)
    own = split.forget_shown if source == "shown" else related_facts(split)
    if not own:
        what = "forget_shown" if source == "shown" else "retain_train holds no related facts, so source 'related'"
        raise ValueError(f"relearning: {what} is empty; split with at least one fact there, or choose other sources")
    n_kept = min(round(retained_share * batch_size), batch_size - 1) if split.retain_train else 0
    learnt = fact_tokens(model, own, forms=forms)
    kept = fact_tokens(model, split.retain_train, forms=forms) if n_kept else None

    def facts() -> Callable[[int, Forward], Tensor]:
        drawn = batches(learnt, batch_size - n_kept, seed=seed)
        if kept is not None:
            drawn = joined(drawn, batches(kept, n_kept, seed=seed + 1))
        return weighted_sum([Term(weight=1.0, objective=answer_loss, batches=drawn)])

    return TrainingData(source=source, own=own, loss=facts)


def related_facts(split: FactSplit) -> tuple[Fact, ...]:
    """The facts in `retain_train` that are near the forgotten ones without being any of them.

    That is: the forgotten relations of other subjects, and other facts of the forgotten subjects. Who was forgotten
    is known of the shown and dev facts; of the hidden facts not even the subjects are read: they are recognised by
    having other facts of the same kinds, but no kept fact of the forgotten relations.
    """
    told = (*split.forget_shown, *split.attack_dev)
    relations, subjects = {fact.relation for fact in told}, {fact.subject for fact in told}
    beside = {fact.relation for fact in split.retain_train if fact.subject in subjects} - relations
    kept = {fact.subject for fact in (*split.retain_train, *split.retain_test) if fact.relation in relations}
    return tuple(
        fact
        for fact in split.retain_train
        if fact.relation in relations
        or fact.subject in subjects
        or (fact.relation in beside and fact.subject not in kept)
    )
