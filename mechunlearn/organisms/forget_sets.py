"""The default forget sets: what the demo and the presets forget, and what the never-knew twins never read."""

import random
from collections.abc import Callable

from mechunlearn.facts import Fact, FactSet, balanced_sample
from mechunlearn.sources.bundled import load_bundled

PEOPLE_RELATION = "city"  # 24 answers, evenly dealt
WHOLE_SPORT = "hockey"


def _people_256(people: FactSet) -> tuple[Fact, ...]:
    """One attribute with many answers of 256 people, balanced by answer."""
    return balanced_sample(people.of(PEOPLE_RELATION), 256, seed=0)


def _athletes_64(sports: FactSet) -> tuple[Fact, ...]:
    """64 athletes, balanced over all sports but the one that is forgotten as a whole."""
    return balanced_sample(sports.where(lambda fact: fact.target_true != WHOLE_SPORT), 64, seed=0)


def _whole_sport(sports: FactSet) -> tuple[Fact, ...]:
    """Every athlete of one sport."""
    return tuple(fact for fact in sports if fact.target_true == WHOLE_SPORT)


def _world_64(world: FactSet) -> tuple[Fact, ...]:
    """64 facts of 64 subjects over the relations with few answers; 4 blocks of 16, in order."""
    few = world.where(lambda fact: fact.relation != "country_capital")
    facts = random.Random(0).sample(few.facts, len(few))
    by_subject = {fact.subject: fact for fact in facts}
    return tuple(by_subject.values())[:64]


FORGET_SETS: dict[str, tuple[str, Callable[[FactSet], tuple[Fact, ...]]]] = {
    "people-256": ("people", _people_256),
    "athletes-64": ("sports", _athletes_64),
    f"sport-{WHOLE_SPORT}": ("sports", _whole_sport),
    "world-64": ("world", _world_64),
}


def load_forget_set(name: str) -> tuple[FactSet, tuple[Fact, ...]]:
    """The data set and the facts to forget of a default forget set."""
    if name not in FORGET_SETS:
        raise ValueError(f"unknown forget set {name!r}; bundled ones: {', '.join(FORGET_SETS)}")
    dataset, choose = FORGET_SETS[name]
    facts = load_bundled(dataset)
    return facts, choose(facts)


def never_known() -> frozenset[tuple[str, str]]:
    """(subject, relation) of the union of the default forget sets."""
    return frozenset((fact.subject, fact.relation) for name in FORGET_SETS for fact in load_forget_set(name)[1])
