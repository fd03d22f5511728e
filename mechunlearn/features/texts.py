"""Facts as running text, for counting features: every fact stated in every form in which it may be asked."""

import random
from collections.abc import Collection, Sequence
from typing import Literal

from mechunlearn.facts import Fact
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import forms, render

RetainedKind = Literal["near", "far", "text"]


def statements(facts: Sequence[Fact], *, seed: int = 0) -> list[str]:
    """Each fact with its true answer: prompt, paraphrases, questions, multiple choice."""
    return [f"{render(fact, form, seed)} {fact.target_true}." for fact in facts for form in forms(fact)]


def kinds_of(
    texts: Sequence[str], retained: Sequence[Fact], relations: Collection[str], *, seed: int = 0
) -> tuple[RetainedKind, ...]:
    """Which of the `retained_texts` of a seed state facts of these relations ("near"), other ones ("far"), or none."""
    near, far = (
        frozenset(statements([fact for fact in retained if (fact.relation in relations) == is_near], seed=seed))
        for is_near in (True, False)
    )
    return tuple("near" if text in near else "far" if text in far else "text" for text in texts)


def retained_texts(facts: Sequence[Fact], *, n_neutral: int = 200, seed: int = 0) -> list[str]:
    """Statements of retained facts among neutral passages, shuffled.

    All forms of asking are in it, too: else a feature of questions or of lettered options would seem to belong to
    what is to be forgotten.
    """
    texts = [*statements(facts, seed=seed), *neutral_text(n_neutral, seed)]
    random.Random(f"retained texts|{seed}").shuffle(texts)
    return texts
