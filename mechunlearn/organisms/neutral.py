"""Plain sentences that state no fact of any data set: filler for the twins, and text to keep fluent on."""

import random

PLACES = "garden river hill market road bridge field forest lake tower window kitchen harbor valley".split()
THINGS = "lamp basket chair letter table stone bottle door cup box rope ladder coat boat bell blanket".split()
PEOPLE = "child neighbor visitor stranger friend traveler gardener girl boy woman man".split()
QUALITIES = "old small quiet heavy warm cold bright dusty long empty soft plain broken clean".split()
MOVES = "walked ran turned came waited stood slept looked stayed sat".split()
DEEDS = "carried found moved kept left washed opened closed lifted dropped".split()
TIMES = "morning evening night winter summer spring autumn day".split()

PATTERNS = (
    "In the {time} the {person} {move} near the {place}.",
    "The {quality} {thing} was on the {thing2} by the {place}.",
    "A {person} {deed} the {quality} {thing} and {move} home.",
    "After a {quality} {time} the {place} was {quality2} again.",
    "Nobody {deed} the {thing} before the {time} ended.",
    "The {person} and the {person2} {move} along the {quality} {place}.",
    "When the {time} came, the {person} {deed} a {thing}.",
)


def neutral_sentence(rng: random.Random) -> str:
    """One sentence drawn from the patterns."""
    return rng.choice(PATTERNS).format(
        time=rng.choice(TIMES), person=rng.choice(PEOPLE), person2=rng.choice(PEOPLE), move=rng.choice(MOVES),
        deed=rng.choice(DEEDS), place=rng.choice(PLACES), thing=rng.choice(THINGS), thing2=rng.choice(THINGS),
        quality=rng.choice(QUALITIES), quality2=rng.choice(QUALITIES),
    )  # fmt: skip


def neutral_text(n_passages: int, seed: int, sentences: int = 4) -> list[str]:
    """`n_passages` short passages of a few sentences each, seeded."""
    rng = random.Random(seed)
    return [" ".join(neutral_sentence(rng) for _ in range(sentences)) for _ in range(n_passages)]
