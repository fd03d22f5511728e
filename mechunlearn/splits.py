"""Splits of edits that are made one after another, and splits in files.

No torch here: see facts.py for the split itself.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mechunlearn.facts import Fact, FactSplit
from mechunlearn.files import whole_file

FORMAT = "mechunlearn splits 1"

_PARTS = ("forget_shown", "forget_hidden", "attack_dev", "retain_train", "retain_test", "same_subject")


def split_after(split: FactSplit, earlier: Sequence[FactSplit]) -> FactSplit:
    """The split of an edit on top of earlier ones: it retains what all of them keep, and scores what none trained on.

    What an earlier edit forgot is retained no longer, for an editor that trained on its true answers would bring it
    back. `retain_train` loses what the earlier splits only score; `retain_test` and `same_subject` lose what their
    editors trained on. `retain_test` takes in what they scored, and stays about subjects of which nothing is forgotten.
    The forgotten parts stay as they are.
    """
    everything = (*earlier, split)
    forgotten = {(fact.subject, fact.relation) for each in everything for fact in each.forget}
    subjects = {fact.subject for each in everything for fact in each.forget}
    trained = {fact.key for each in earlier for fact in each.retain_train}
    unseen = {fact.key for each in earlier for fact in (*each.retain_test, *each.same_subject)}
    scored = (fact for each in (split, *earlier) for fact in each.retain_test if fact.subject not in subjects)

    def kept(facts: Iterable[Fact], without: set[tuple[str, str, str]]) -> tuple[Fact, ...]:
        once = {fact.key: fact for fact in facts if (fact.subject, fact.relation) not in forgotten}
        return tuple(fact for key, fact in once.items() if key not in without)

    return replace(
        split,
        retain_train=kept(split.retain_train, unseen),
        retain_test=kept(scored, trained),
        same_subject=kept(split.same_subject, trained),
    )


def together(splits: Sequence[FactSplit]) -> FactSplit:
    """One split of what several edits in sequence forgot, for an attack on all of them; it retains what the last keeps.

    Args:
        splits: as `in_sequence` (and `edit --on`) makes them.
    """
    taken: set[tuple[str, str, str]] = set()
    parts: dict[str, tuple[Fact, ...]] = {}
    for part in ("forget_hidden", "attack_dev", "forget_shown"):  # what is hidden in one must be shown in none
        facts = {fact.key: fact for split in splits for fact in getattr(split, part) if fact.key not in taken}
        taken |= facts.keys()
        parts[part] = tuple(facts.values())
    return replace(splits[-1], **parts)


def in_sequence(splits: Sequence[FactSplit]) -> tuple[FactSplit, ...]:
    """The splits as edits made in this order need them: each `split_after` those before it."""
    ordered: list[FactSplit] = []
    for split in splits:
        ordered.append(split_after(split, ordered))
    return tuple(ordered)


def held_out(splits: Sequence[FactSplit]) -> tuple[Fact, ...]:
    """What the splits retain for scoring: no editor trained on it, and nothing of its subjects is forgotten."""
    trained = {fact.key for split in splits for fact in split.retain_train}
    subjects = {fact.subject for split in splits for fact in split.forget}
    once = {fact.key: fact for split in splits for fact in split.retain_test}
    return tuple(fact for key, fact in once.items() if key not in trained and fact.subject not in subjects)


def save_splits(splits: Sequence[FactSplit], path: str | Path) -> None:
    """Write one JSON file, all or nothing."""
    record = {"format": FORMAT, "splits": [asdict(split) for split in splits]}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record), encoding="utf-8")


def load_splits(path: str | Path) -> tuple[FactSplit, ...]:
    """Read what `save_splits` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no saved splits.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no splits at {path}; write them with save_splits")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError("another format")
        return tuple(_split(each) for each in record["splits"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no saved splits ({type(error).__name__}: {error}); save them anew") from None


def _split(record: dict[str, Any]) -> FactSplit:
    parts: dict[str, Any] = {part: tuple(map(_fact, record[part])) for part in _PARTS}
    return FactSplit(**record | parts)


def _fact(record: dict[str, Any]) -> Fact:
    """A fact of which JSON has made its tuples lists."""
    tuples: dict[str, Any] = {name: tuple(record[name]) for name in ("paraphrases", "questions", "choices")}
    tuples["neighborhood"] = tuple((prompt, own) for prompt, own in record["neighborhood"])
    return Fact(**record | tuples)
