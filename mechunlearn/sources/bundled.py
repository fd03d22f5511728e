"""The project's own data sets: `datasets/<name>/facts.csv` with `templates.toml`."""

import csv
import random
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mechunlearn.facts import Fact, FactSet

BUNDLED = ("people", "sports", "world")
MAX_CHOICES = 24  # candidates an answer is scored among; more only cost time


@dataclass(frozen=True, kw_only=True)
class RelationTemplates:
    """How one relation is put into words; every string ends right before the answer."""

    declarative: tuple[str, ...]
    questions: tuple[str, ...]
    pronoun: tuple[str, ...] = ()
    headline: bool = True
    functional: bool = True


def dataset_folder(name: str) -> Path:
    """Where a bundled data set lies: beside the package in a checkout, inside it in a wheel."""
    if name not in BUNDLED:
        raise ValueError(f"unknown data set {name!r}; bundled ones: {', '.join(BUNDLED)}")
    package = Path(str(files("mechunlearn")))
    for folder in (package / "datasets" / name, package.parent / "datasets" / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"data set {name!r} is not installed beside mechunlearn; reinstall the package")


def load_templates(name: str) -> dict[str, RelationTemplates]:
    """The wording of every relation of a bundled data set."""
    with (dataset_folder(name) / "templates.toml").open("rb") as file:
        relations = tomllib.load(file)["relations"]
    return {
        relation: RelationTemplates(
            declarative=tuple(table["declarative"]),
            questions=tuple(table["questions"]),
            pronoun=tuple(table.get("pronoun", ())),
            headline=table.get("headline", True),
            functional=table.get("functional", True),
        )
        for relation, table in relations.items()
    }


def load_rows(name: str) -> list[tuple[str, str, str]]:
    """The (subject, relation, answer) rows of a bundled data set, as they stand in the file."""
    with (dataset_folder(name) / "facts.csv").open(encoding="utf-8", newline="") as file:
        return [(row["subject"], row["relation"], row["answer"]) for row in csv.DictReader(file)]


def load_bundled(name: str) -> FactSet:
    """A bundled data set as facts: all forms of asking, and the relation's answers as choices.

    A relation with more than 24 answers gets the true one and 23 others, drawn by a generator seeded with the
    fact itself, so that a fact's choices do not depend on the rest of the file's order.
    """
    templates = load_templates(name)
    rows = load_rows(name)
    answers = {relation: sorted({answer for _, other, answer in rows if other == relation}) for relation in templates}
    return FactSet(
        name=name,
        facts=tuple(
            Fact(
                subject=subject,
                relation=relation,
                prompt=templates[relation].declarative[0],
                target_true=answer,
                paraphrases=templates[relation].declarative[1:],
                questions=templates[relation].questions,
                choices=draw_choices(subject, relation, (answer,), answers[relation]),
            )
            for subject, relation, answer in rows
        ),
    )


def draw_choices(subject: str, relation: str, keep: Sequence[str], answers: Iterable[str]) -> tuple[str, ...]:
    """The candidates of one fact: those to keep and the relation's other answers, at most 24, sorted.

    Too many answers are thinned by a generator seeded with subject and relation alone.

    Args:
        keep: answers that must stay, the true one among them.
    """
    others = sorted(answer for answer in dict.fromkeys(answers) if answer not in keep)  # linear when sorted already
    room = MAX_CHOICES - len(set(keep))
    if len(others) > room:
        others = random.Random(f"{subject}|{relation}").sample(others, room)
    return tuple(sorted({*keep, *others}))
