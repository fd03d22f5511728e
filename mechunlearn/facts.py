"""Facts, sets of facts, and the split that keeps editor, attacker and judge apart.

No torch here: facts are plain data, hashed, so that every result can name what it was measured on.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import overload

from mechunlearn.html_card import html_card

_SHOWN = 8  # rows of a table in a notebook


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One (subject, relation, answer) with the ways to ask for it.

    Templates hold the subject as one ``{}`` and end right before the answer. Answers are written
    without a leading space.
    """

    subject: str
    relation: str
    prompt: str
    target_true: str
    target_new: str | None = None
    paraphrases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    neighborhood: tuple[tuple[str, str], ...] = ()
    """(whole prompt, its own answer) about other subjects: must not change under an edit."""
    choices: tuple[str, ...] = ()
    """The candidates an answer is scored among; holds target_true."""

    def __post_init__(self) -> None:
        for name in ("subject", "relation", "target_true"):
            value = getattr(self, name)
            if not value or value != value.strip():
                raise ValueError(
                    f"fact field '{name}': got {value!r}, allowed: a non-empty string without outer spaces"
                )
        for template in (self.prompt, *self.paraphrases, *self.questions):
            if template.count("{}") != 1:
                raise ValueError(f"fact template: got {template!r}, allowed: exactly one '{{}}' for the subject")
        if self.choices and self.target_true not in self.choices:
            raise ValueError(f"fact field 'choices': the answer {self.target_true!r} of {self.subject!r} is missing")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError(f"fact field 'choices': repeated candidates for {self.subject!r}")
        if self.target_new == self.target_true:
            raise ValueError(
                f"fact field 'target_new': equals the true answer {self.target_true!r} of {self.subject!r}"
            )

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity of a fact: subject, relation, true answer."""
        return (self.subject, self.relation, self.target_true)

    def ask(self, template: str) -> str:
        """Put the subject into one of the fact's templates."""
        return template.replace("{}", self.subject)

    def _repr_html_(self) -> str:
        lines = {
            "prompt": f"{self.ask(self.prompt)} → {self.target_true}", "instead": self.target_new,
            "among": ", ".join(self.choices), "paraphrases": len(self.paraphrases), "questions": len(self.questions),
        }  # fmt: skip
        return html_card(f"{self.subject}: {self.relation}", lines)


@dataclass(frozen=True, kw_only=True)
class FactSet(Sequence[Fact]):
    """A named, ordered, duplicate-free collection of facts."""

    name: str
    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        seen = Counter(fact.key for fact in self.facts)
        if repeated := [key for key, n in seen.items() if n > 1]:
            raise ValueError(
                f"fact set '{self.name}': {len(repeated)} repeated facts, first {repeated[0]}; remove them"
            )

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> "FactSet": ...
    def __getitem__(self, index: int | slice) -> "Fact | FactSet":
        return replace(self, facts=self.facts[index]) if isinstance(index, slice) else self.facts[index]

    @property
    def relations(self) -> tuple[str, ...]:
        """Relation names in order of first appearance."""
        return tuple(dict.fromkeys(fact.relation for fact in self.facts))

    @cached_property
    def sha256(self) -> str:
        """Hash of every field of every fact, in order."""
        return hash_facts(self.facts)

    def where(self, keep: Callable[[Fact], bool]) -> "FactSet":
        """The facts for which `keep` is true, in order."""
        return replace(self, facts=tuple(fact for fact in self.facts if keep(fact)))

    def of(self, *relations: str) -> "FactSet":
        """The facts of the given relations; an unknown one is an error."""
        for relation in relations:
            if relation not in self.relations:
                raise ValueError(
                    f"fact set '{self.name}': got relation {relation!r}, allowed: {', '.join(self.relations)}"
                )
        return self.where(lambda fact: fact.relation in relations)

    def _repr_html_(self) -> str:
        subjects = len({fact.subject for fact in self.facts})
        rows = [(fact.subject, fact.relation, fact.ask(fact.prompt), fact.target_true) for fact in self.facts[:_SHOWN]]
        more = [(f"… {len(self) - _SHOWN} more",)] if len(self) > _SHOWN else []
        lines = {"facts": len(self), "subjects": subjects, "relations": ", ".join(self.relations)}
        return html_card(self.name, lines, [("subject", "relation", "prompt", "answer"), *rows, *more])


def hash_facts(facts: Iterable[Fact]) -> str:
    """SHA-256 over the canonical JSON of the facts."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(asdict(fact), sort_keys=True).encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class FactSplit:
    """Who may see which fact.

    The three forget parts share no subject; retain and same-subject facts share no fact with them.
    """

    forget_shown: tuple[Fact, ...]
    """The editor trains on them; an attacker may relearn from them."""
    forget_hidden: tuple[Fact, ...]
    """The editor trains on them; no attacker sees them; recovery is scored on them alone."""
    attack_dev: tuple[Fact, ...]
    """The editor trains on them; the attacker chooses its settings on them."""
    retain_train: tuple[Fact, ...]
    """Kept facts that editor and attacker may train on (other attributes of half the forgotten subjects among them)."""
    retain_test: tuple[Fact, ...]
    """Kept facts about other subjects, scored only."""
    same_subject: tuple[Fact, ...] = ()
    """Other attributes of the other half of the forgotten subjects, scored only."""
    seed: int = 0
    fold: int = 0

    @property
    def forget(self) -> tuple[Fact, ...]:
        """All facts the editor is to remove."""
        return (*self.forget_shown, *self.attack_dev, *self.forget_hidden)

    @cached_property
    def sha256(self) -> str:
        """Hash of all parts, in order."""
        return hash_facts((*self.forget, *self.retain_train, *self.retain_test, *self.same_subject))

    def _repr_html_(self) -> str:
        names = ("forget_shown", "forget_hidden", "attack_dev", "retain_train", "retain_test", "same_subject")
        parts: dict[str, tuple[Fact, ...]] = {name: getattr(self, name) for name in names}
        rows = [
            (name, len(part), len({fact.subject for fact in part}), part[0].ask(part[0].prompt) if part else "")
            for name, part in parts.items()
        ]
        table = [("part", "facts", "subjects", "the first"), *rows]
        return html_card(f"{len(self.forget)} facts to forget", {"seed": self.seed, "fold": self.fold}, table)

    def check(self) -> None:
        """Raise ValueError if a part leaks into another or the answers are unevenly dealt."""
        subjects = {
            name: {f.subject for f in getattr(self, name)} for name in ("forget_shown", "forget_hidden", "attack_dev")
        }
        for a, b in (
            ("forget_shown", "forget_hidden"),
            ("forget_shown", "attack_dev"),
            ("forget_hidden", "attack_dev"),
        ):
            if both := subjects[a] & subjects[b]:
                raise ValueError(f"split: {a} and {b} share subjects, e.g. {sorted(both)[0]!r}; split by subject")
        forgotten = {(f.subject, f.relation) for f in self.forget}
        for name in ("retain_train", "retain_test", "same_subject"):
            if leaked := [f for f in getattr(self, name) if (f.subject, f.relation) in forgotten]:
                raise ValueError(f"split: {name} holds a forgotten fact, {leaked[0].key}; remove it")
        if overlap := {f.key for f in self.retain_train} & {f.key for f in (*self.retain_test, *self.same_subject)}:
            raise ValueError(f"split: retain_train and a test part share {sorted(overlap)[0]}; remove it")
        self._check_marginals()

    def _check_marginals(self) -> None:
        """The hidden answers must not be guessable from how the shown ones are distributed."""
        for relation in {f.relation for f in self.forget_hidden}:
            shown = Counter(f.target_true for f in self.forget_shown if f.relation == relation)
            hidden = Counter(f.target_true for f in self.forget_hidden if f.relation == relation)
            n_shown, n_hidden = sum(shown.values()), sum(hidden.values())
            if not n_shown or len(shown | hidden) < 2:
                continue
            gap = 0.5 * sum(abs(shown[a] / n_shown - hidden[a] / n_hidden) for a in shown | hidden)
            # total variation of two random halves is about sqrt(k / n); stratified parts stay far below
            if gap > 0.5 and min(n_shown, n_hidden) >= 2 * len(shown | hidden):
                raise ValueError(
                    f"split: answers of '{relation}' are dealt unevenly (total variation {gap:.2f}); use another seed"
                )


def split_facts(
    facts: FactSet,
    forget: Iterable[Fact],
    *,
    folds: int = 2,
    fold: int = 0,
    dev_share: float = 0.2,
    n_retain_train: int | None = None,
    n_retain_test: int | None = None,
    seed: int = 0,
) -> FactSplit:
    """Deal the facts to forget into shown, hidden and dev parts, by subject and balanced by answer.

    Subjects are shuffled with `seed` within each answer and dealt to `folds` parts; part `fold` is hidden, so
    that over all folds every forgotten fact is hidden exactly once. Of the rest, `dev_share` is the attacker's
    dev part. Retain facts are shuffled with the same seed; a share of them equal to a fifth is kept for testing.

    Raises:
        ValueError: forget facts that are not in `facts`, too few subjects, a fold outside [0, folds).
    """
    forget = tuple(forget)
    known = {fact.key for fact in facts}
    if missing := [fact.key for fact in forget if fact.key not in known]:
        raise ValueError(
            f"forget set: {len(missing)} of {len(forget)} facts are not in '{facts.name}', first {missing[0]}"
        )
    if folds < 2 or not 0 <= fold < folds:
        raise ValueError(f"split: got fold {fold} of {folds}, allowed: folds >= 2 and 0 <= fold < folds")
    rng = random.Random(seed)
    parts = _deal_subjects(forget, folds, rng)
    if min(len(part) for part in parts) < 1 or sum(len(part) for part in parts) - len(parts[fold]) < 2:
        raise ValueError(f"forget set: got {len(forget)} facts, too few subjects for {folds} folds and a dev part")
    rest = [fact for i, part in enumerate(parts) if i != fold for fact in part]
    shown, dev = _deal_dev(rest, dev_share, rng)
    forgotten = {(fact.subject, fact.relation) for fact in forget}
    subjects = sorted({fact.subject for fact in forget})
    rng.shuffle(subjects)
    train_subjects = set(subjects[: len(subjects) // 2])
    kept = [fact for fact in facts if (fact.subject, fact.relation) not in forgotten]
    others = [fact for fact in kept if fact.subject not in set(subjects)]
    same = [fact for fact in kept if fact.subject in set(subjects)]
    rng.shuffle(others)
    n_test = len(others) // 5 if n_retain_test is None else n_retain_test
    train = [*others[n_test:], *(fact for fact in same if fact.subject in train_subjects)]
    rng.shuffle(train)
    split = FactSplit(
        forget_shown=tuple(shown),
        forget_hidden=tuple(parts[fold]),
        attack_dev=tuple(dev),
        retain_train=tuple(train[:n_retain_train]),
        retain_test=tuple(others[:n_test]),
        same_subject=tuple(fact for fact in same if fact.subject not in train_subjects),
        seed=seed,
        fold=fold,
    )
    split.check()
    return split


def rotations(split: FactSplit, folds: int) -> tuple[FactSplit, ...]:
    """The split itself, and it again with each other part of its forgotten facts hidden: every one is hidden once.

    Retained parts stay as they are, so one edit serves all rotations; what changes is what the attacker is shown.

    Raises:
        ValueError: fewer subjects than folds.
    """
    rng = random.Random(f"{split.seed} {split.fold} rotations")
    shown = sorted((*split.forget_shown, *split.attack_dev), key=lambda fact: fact.key)
    parts = _deal_subjects(shown, folds - 1, rng)
    if folds < 2 or not all(parts):
        raise ValueError(f"split: got {folds} folds for {len(split.forget)} forgotten facts, allowed: 2 to one a fact")
    dev_share = len(split.attack_dev) / len(shown)
    turned = [split]
    for i, hidden in enumerate(parts):
        rest = [*split.forget_hidden, *(fact for j, part in enumerate(parts) if j != i for fact in part)]
        train, dev = _deal_dev(rest, dev_share, rng)
        one = replace(
            split, forget_shown=tuple(train), forget_hidden=tuple(hidden), attack_dev=tuple(dev),
            fold=(split.fold + i + 1) % folds,
        )  # fmt: skip
        one.check()
        turned.append(one)
    return tuple(turned)


def _deal_subjects(forget: Sequence[Fact], folds: int, rng: random.Random) -> list[list[Fact]]:
    """Deal whole subjects to folds like cards, answer by answer, so that answers are balanced."""
    by_answer: Mapping[tuple[str, str], list[str]] = defaultdict(list)
    by_subject: Mapping[str, list[Fact]] = defaultdict(list)
    for fact in forget:
        if fact.subject not in by_subject:
            by_answer[fact.relation, fact.target_true].append(fact.subject)
        by_subject[fact.subject].append(fact)
    order: list[str] = []
    for answer in sorted(by_answer):
        group = by_answer[answer]
        rng.shuffle(group)
        order += group
    parts: list[list[Fact]] = [[] for _ in range(folds)]
    for i, subject in enumerate(order):
        parts[i % folds] += by_subject[subject]
    for part in parts:
        rng.shuffle(part)
    return parts


def _deal_dev(rest: Sequence[Fact], share: float, rng: random.Random) -> tuple[list[Fact], list[Fact]]:
    subjects = list(dict.fromkeys(fact.subject for fact in rest))
    rng.shuffle(subjects)
    dev = set(subjects[: max(1, round(share * len(subjects)))])
    return [f for f in rest if f.subject not in dev], [f for f in rest if f.subject in dev]


def balanced_sample(facts: Iterable[Fact], n: int, seed: int = 0) -> tuple[Fact, ...]:
    """`n` facts taken in turns from the answers of each relation, in a seeded order, one a subject.

    Where there are more answers than facts wanted, relations take turns, and which answers come first is drawn: else
    all facts would be of the first relation by name.

    Raises:
        ValueError: fewer than `n` subjects.
    """
    rng = random.Random(seed)
    shuffled = list(facts)
    shuffled = rng.sample(shuffled, len(shuffled))
    one_a_subject = {fact.subject: fact for fact in shuffled}
    if n > len(one_a_subject):
        raise ValueError(f"forget set: got n = {n}, allowed: at most {len(one_a_subject)}, the subjects that are there")
    by_answer: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in one_a_subject.values():
        by_answer[fact.relation, fact.target_true].append(fact)
    order = sorted(by_answer)
    if n < len(order):
        order = _relations_in_turns(order, rng)
    chosen: list[Fact] = []
    while len(chosen) < n:
        for answer in order:
            if by_answer[answer] and len(chosen) < n:
                chosen.append(by_answer[answer].pop())
    return tuple(chosen)


def _relations_in_turns(keys: Sequence[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """(relation, answer) pairs so that each relation has had its k-th before any has its k+1-th."""
    turns: list[tuple[int, tuple[str, str]]] = []
    seen: Counter[str] = Counter()
    for relation, answer in rng.sample(keys, len(keys)):
        turns.append((seen[relation], (relation, answer)))
        seen[relation] += 1
    return [key for _, key in sorted(turns, key=lambda turn: turn[0])]


def with_edit_targets(facts: Iterable[Fact], seed: int = 0) -> tuple[Fact, ...]:
    """Give every fact without one a target_new: a wrong candidate, drawn evenly and seeded.

    Raises:
        ValueError: a fact has fewer than two choices, so there is no wrong answer to draw.
    """
    rng = random.Random(seed)
    targets: list[Fact] = []
    for fact in facts:
        wrong = [choice for choice in fact.choices if choice != fact.target_true]
        if fact.target_new is None and not wrong:
            raise ValueError(f"fact {fact.key}: no target_new and no other choices to draw one from; add choices")
        targets.append(fact if fact.target_new else replace(fact, target_new=rng.choice(wrong)))
    return tuple(targets)
