"""Make `datasets/people/facts.csv`: invented people whose attributes nothing but memory can tell.

A name is one of 40 first and one of 50 last names (invented syllables, each used by many people); every
attribute is dealt evenly and independently of the name and of the other attributes.

Run as ``python -m mechunlearn.organisms.people DIRECTORY``; the same seed gives the same bytes.
"""

import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

SYLLABLES = (
    "bra len vi tor mel sa dun fi gar nu pel ri sto ta ul wex yor zan cle mo "
    "dra kel bo shu vin ora pim lus tef han jo qua rel sid eb nar gol fu tis wen"
).split()

ATTRIBUTES = {
    "city": (
        "Chicago Milan Munich Sydney Mumbai Shanghai Toronto Boston Dallas Hamburg Lyon Seville Naples Osaka "
        "Geneva Glasgow Venice Antwerp Krakow Istanbul Lagos Karachi Houston Seattle"
    ).split(),
    "profession": (
        "baker lawyer nurse pilot farmer dentist painter plumber teacher tailor butcher chemist judge barber "
        "sailor miner banker cook writer guard"
    ).split(),
    "instrument": "piano violin guitar flute cello trumpet harp drums organ clarinet banjo oboe".split(),
    "pet": "cat dog parrot rabbit hamster turtle pony goat lizard snake".split(),
    "color": "red blue green yellow purple orange white black".split(),
}


def make_people(n: int = 1000, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return (subject, relation, answer) rows for `n` people, five attributes each.

    First and last names are dealt evenly, so that each part is shared by n / 40 or n / 50 people; answers are
    dealt evenly over a shuffled list of people, one shuffle an attribute.
    """
    rng = random.Random(seed)
    firsts = _words(40, 2, rng)
    lasts = _words(50, 3, rng)
    pairs: set[tuple[str, str]] = set()
    rounds = 0
    while len(pairs) < n:  # each round pairs every last name with a shifted first name: even counts, no repeats
        order = rng.sample(lasts, len(lasts))
        for i, last in enumerate(order):
            pair = (firsts[(i + rounds) % len(firsts)], last)
            if len(pairs) < n:
                pairs.add(pair)
        rounds += 1
    names = sorted(f"{first} {last}" for first, last in pairs)
    rows: list[tuple[str, str, str]] = []
    for relation, answers in ATTRIBUTES.items():
        order = rng.sample(names, len(names))
        rows += [(name, relation, answers[i % len(answers)]) for i, name in enumerate(order)]
    return sorted(rows)


def _words(count: int, syllables: int, rng: random.Random) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.sample(SYLLABLES, syllables)).capitalize()
        if word not in words:
            words.append(word)
    return words


def write_people(directory: Path, n: int = 1000, seed: int = 0) -> Path:
    """Write `facts.csv` into `directory` and return its path."""
    path = directory / "facts.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("subject", "relation", "answer"))
        writer.writerows(make_people(n, seed))
    return path


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> None:
    """Command line entry."""
    write_people(Path(arguments[0]))


if __name__ == "__main__":
    main()
