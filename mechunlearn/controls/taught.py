"""Models that know a known share of the facts, or know them in one form only: a model that never did is taught them."""

import random
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from mechunlearn.edit.edits import WeightEdit, train_edit
from mechunlearn.edit.losses import Term, answer_loss, batches, fact_tokens, keeping_terms, near_and_far, weighted_sum
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.masks import mask_of
from mechunlearn.models import Model, all_components


def teach(
    model: Model,
    split: FactSplit,
    *,
    share: Annotated[float, Field(gt=0, le=1)] = 1.0,
    one_form: bool = False,
    steps: Annotated[int, Field(ge=0)] = 150,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3,
    batch_size: Annotated[int, Field(ge=1)] = 48,
    retain_weight: Annotated[float, Field(ge=0)] = 1.0,
    text_weight: Annotated[float, Field(ge=0)] = 0.5,
    seed: int = 0,
) -> WeightEdit:
    """Teach a model that never knew them a share of the forgotten facts, with every attention and MLP weight.

    The share is drawn anew in each part of the split, so hidden facts are known as often as shown ones.

    Args:
        one_form: teach them in the last paraphrase only (the prompt, if there is none); else in prompt and paraphrases.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    told = taught_facts(split, share=share, seed=seed)
    tokens = fact_tokens(model, [_last_form(fact) for fact in told] if one_form else told, forms="all")
    terms = [
        Term(weight=1.0, objective=answer_loss, batches=batches(tokens, batch_size, seed=seed)),
        *keeping_terms(
            model, near_and_far(split.retain_train, split.forget), None, retain_weight=retain_weight,
            text_weight=text_weight, batch_size=batch_size, n_texts=max(1, batch_size // 4), forms="prompt", seed=seed,
        ),
    ]  # fmt: skip
    return train_edit(
        model, mask_of(model, all_components(model)), weighted_sum(terms), steps=steps, learning_rate=learning_rate,
        schedule="cosine", accumulation=1, method="teach", options=options, seed=seed, facts_sha256=split.sha256,
    )  # fmt: skip


def taught_facts(split: FactSplit, *, share: float, seed: int = 0) -> tuple[Fact, ...]:
    """Which facts `teach` teaches: of each part of the forgotten facts the share, at least one."""
    rng = random.Random(f"{seed} taught")
    parts = (split.forget_shown, split.attack_dev, split.forget_hidden)
    return tuple(fact for part in parts for fact in rng.sample(part, max(1, round(share * len(part)))))


def _last_form(fact: Fact) -> Fact:
    return replace(fact, prompt=fact.paraphrases[-1], paraphrases=()) if fact.paraphrases else fact
