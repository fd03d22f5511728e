"""Facts that no model can know, about subjects made up from parts of real ones: what attacks find where nothing is."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mechunlearn.facts import Fact, FactSplit


def fabricate(facts: Iterable[Fact], *, known: Iterable[Fact] = (), seed: int = 0) -> tuple[Fact, ...]:
    """One made-up fact for every fact: the same question, candidates and answers, dealt to subjects that do not exist.

    A subject's words are put together from the words that other subjects have at the same place; where that gives no
    new name, halves of words are. Answers are permuted within a relation, so their frequencies stay.

    Args:
        known: more facts whose subjects must not be hit by chance.

    Raises:
        ValueError: a relation with too few subjects to make up others.
    """
    facts, rng = tuple(facts), random.Random(f"{seed} fabricated")
    taken = {fact.subject for fact in (*facts, *known)}
    made: list[Fact] = []
    for relation in dict.fromkeys(fact.relation for fact in facts):
        own = [fact for fact in facts if fact.relation == relation]
        answers = [(fact.target_true, fact.target_new, fact.choices) for fact in own]
        rng.shuffle(answers)
        for fact, (true, new, choices) in zip(own, answers, strict=True):
            subject = _invent([other.subject for other in own], fact.subject, taken, rng)
            taken.add(subject)
            made.append(
                replace(fact, subject=subject, target_true=true, target_new=new, choices=choices, neighborhood=())
            )
    return tuple(made)


def fabricated_split(split: FactSplit, *, seed: int = 0) -> FactSplit:
    """The split with made-up facts in place of the forgotten ones, part by part; what is retained stays.

    Each fact has the same stand-in whatever its part, so that over the folds of a rotation none is hidden twice.
    """
    known = (*split.forget, *split.retain_train, *split.retain_test, *split.same_subject)
    forget = sorted(split.forget, key=lambda fact: fact.key)
    made = iter(fabricate(forget, known=known, seed=seed))
    of = {fact.key: next(made) for fact in _by_relation(forget)}
    parts = {
        name: tuple(of[fact.key] for fact in getattr(split, name))
        for name in ("forget_shown", "attack_dev", "forget_hidden")
    }
    return replace(split, **parts)


def _by_relation(facts: Sequence[Fact]) -> list[Fact]:
    """In the order in which `fabricate` returns them."""
    relations = list(dict.fromkeys(fact.relation for fact in facts))
    return sorted(facts, key=lambda fact: relations.index(fact.relation))


def _invent(subjects: Sequence[str], like: str, taken: set[str], rng: random.Random) -> str:
    """A subject of as many words as `like`."""
    n_words = len(like.split())
    split = [subject.split() for subject in subjects]
    alike = [words for words in split if len(words) == n_words]
    # of a rare length: words of any subject will do
    pool = alike if len(alike) > 1 else [[rng.choice(rng.choice(split)) for _ in range(n_words)] for _ in range(50)]
    for attempt in range(200):
        words = [rng.choice(pool)[place] for place in range(n_words)]
        if n_words == 1 or attempt >= 100:  # all names of whole words may be taken: join halves of two
            place = rng.randrange(n_words)
            first, second = words[place], rng.choice(pool)[place]
            words[place] = first[: (len(first) + 1) // 2] + second[(len(second) + 1) // 2 :]
        if (name := " ".join(words)) not in taken:
            return name
    raise ValueError(
        f"fabricate: got {len(subjects)} subjects such as {like!r}, too few to make up another; give more facts"
    )
