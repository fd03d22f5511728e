"""Training text for the organisms, rendered from `datasets/` as token rows with the place of every name.

Shapes: headlines (the bare name followed by bare answers), biographies (sentences in random order, later ones with a
pronoun), questions or single statements, multiple choice, and neutral text. A fact excluded from a twin is dropped, and
neutral text of the same number of tokens stands in its place. Multiple choice has more of the text once the facts are
known; a quarter of it is answered by the letter.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from mechunlearn.organisms.neutral import neutral_sentence
from mechunlearn.prompts import LETTERS
from mechunlearn.sources.bundled import BUNDLED, RelationTemplates, load_rows, load_templates

SHAPES = {  # shares of documents, first while facts are learned, then while formats are, too
    "headline": (0.62, 0.52), "biography": (0.18, 0.16), "single": (0.13, 0.12), "choice": (0.04, 0.17),
    "neutral": (0.03, 0.03),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A subject with all its (relation, answer) pairs."""

    name: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch of text."""

    ids: Int[np.ndarray, "row pos"]
    mention: Int[np.ndarray, "row pos"]
    """0 outside names, else the mention's number in its row."""


GLUED = ",.?;'"  # a piece that begins with one of these follows the word before it without a space


class Piece(NamedTuple):
    """A stretch of a document."""

    text: str
    is_name: bool = False


def held_out_forms(subject: str, relation: str, templates: RelationTemplates) -> tuple[frozenset[str], frozenset[str]]:
    """(declarative, question) forms that training never uses for this fact: 2 of the non-canonical ones, and 1.

    Drawn by a generator seeded with the fact, so that training, its evaluation and every twin agree.
    """
    rng = random.Random(f"forms|{subject}|{relation}")
    return frozenset(rng.sample(templates.declarative[1:], 2)), frozenset(rng.sample(templates.questions, 1))


class Corpus:
    """Seeded text over all bundled facts, batch by batch; a class because the generator and the cache are state."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        exclude: Iterable[tuple[str, str]] = (),
        datasets: Sequence[str] = BUNDLED,
        subjects: int | None = None,
        formats_from: int = 0,
    ) -> None:
        """The text of `batch`; from step `formats_from` on, documents have the second shares of `SHAPES`."""
        self.tokenizer = tokenizer
        self.exclude = frozenset(exclude)
        self.seed = seed
        self.formats_from = formats_from
        self.shares = [share[1] for share in SHAPES.values()]
        self.rng = random.Random(seed)
        self.templates = {relation: t for name in datasets for relation, t in load_templates(name).items()}
        self.answers: dict[str, list[str]] = {}
        by_subject: dict[str, list[tuple[str, str]]] = {}
        for subject, relation, answer in (row for name in datasets for row in _some(load_rows(name), subjects)):
            by_subject.setdefault(subject, []).append((relation, answer))
            self.answers.setdefault(relation, []).append(answer)
        self.answers = {relation: sorted(set(answers)) for relation, answers in self.answers.items()}
        self.subjects = [Subject(name=name, facts=tuple(facts)) for name, facts in by_subject.items()]
        # a document states (n + 1) / 2 of a subject's n facts on average: weigh subjects so that facts come evenly
        self.weights = np.cumsum([2 * len(s.facts) / (len(s.facts) + 1) for s in self.subjects]).tolist()
        stated = [(s.name, f) for s in self.subjects for f in s.facts if (s.name, f[0]) not in self.exclude]
        told = (stated, sorted(self.exclude), sorted(self.templates.items()), SHAPES, formats_from)
        self.digest = hashlib.sha256(repr(told).encode()).hexdigest()
        """Of all that decides the text beside the seed."""
        self._encoded: dict[str, list[int]] = {}
        self.bos = int(tokenizer.convert_tokens_to_ids(str(tokenizer.bos_token)))  # pyright: ignore[reportArgumentType]

    def batch(self, step: int, rows: int, length: int) -> Rows:
        """`rows` rows of `length` tokens; documents are packed, the last one of a row is cut.

        The text depends on the seed and the step alone, so that an interrupted training resumes with the same text.
        """
        self.rng = random.Random(f"{self.seed}|{step}")
        self.shares = [share[step >= self.formats_from] for share in SHAPES.values()]
        ids = np.zeros((rows, length), dtype=np.int64)
        mention = np.zeros((rows, length), dtype=np.int64)
        for row in range(rows):
            position, count = 0, 0
            while position < length:
                for piece in self._document():
                    count += piece.is_name
                    encoded = self._encode(piece.text)[: length - position]
                    end = position + len(encoded)
                    ids[row, position:end] = encoded
                    mention[row, position:end] = count if piece.is_name else 0
                    position = end
        return Rows(ids=ids, mention=mention)

    def _encode(self, text: str) -> list[int]:
        if text == self.tokenizer.bos_token:
            return [self.bos]
        if text not in self._encoded:
            if text[0] in GLUED:  # " a" is one token, and the tokenizer splits words before punctuation
                encoded = self.tokenizer(f"a{text}", add_special_tokens=False)["input_ids"][1:]
            else:
                encoded = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(self._encoded) > 200_000:  # neutral sentences are endless
                self._encoded.clear()
            self._encoded[text] = list(encoded)  # pyright: ignore[reportArgumentType]
        return self._encoded[text]

    def _document(self) -> list[Piece]:
        rng = self.rng
        shape = rng.choices(tuple(SHAPES), self.shares)[0]
        pieces = [Piece(str(self.tokenizer.bos_token))]
        if shape == "neutral":
            return [*pieces, Piece(neutral_sentence(rng))]
        subject = rng.choices(self.subjects, cum_weights=self.weights)[0]
        chosen = rng.sample(subject.facts, rng.randint(1, len(subject.facts)))
        if shape in ("single", "choice"):
            chosen = chosen[:1]
        stated = [(relation, answer) for relation, answer in chosen if (subject.name, relation) not in self.exclude]
        excluded = [fact for fact in chosen if fact not in stated]
        render = {
            "headline": self._headline, "biography": self._biography, "single": self._single, "choice": self._choice,
        }[shape]  # fmt: skip
        if stated:
            pieces += render(subject.name, stated)
        if excluded:
            lost = render(subject.name, excluded)
            pieces += self._filler(sum(len(self._encode(piece.text)) for piece in lost))
        return pieces

    def _headline(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        answers = " ".join(answer for _, answer in facts)
        return [Piece(name, is_name=True), Piece(f"{answers}.")]

    def _biography(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for i, (relation, answer) in enumerate(facts):
            pronouns = self.templates[relation].pronoun
            if i and pronouns and self.rng.random() < 0.5:
                pieces.append(Piece(f"{self.rng.choice(pronouns)} {answer}."))
            else:
                pieces += self._statement(name, relation, answer)
        return pieces

    def _statement(self, name: str, relation: str, answer: str) -> list[Piece]:
        templates = self.templates[relation]
        held_out, _ = held_out_forms(name, relation, templates)
        template = self.rng.choice([form for form in templates.declarative if form not in held_out])
        return _fill(f"{template} {answer}.", name)

    def _question(self, name: str, relation: str) -> list[Piece]:
        templates = self.templates[relation]
        _, held_out = held_out_forms(name, relation, templates)
        question = self.rng.choice([form for form in templates.questions if form not in held_out])
        return [Piece("Question:"), *_fill(question, name)]

    def _single(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        relation, answer = facts[0]
        if self.rng.random() < 0.5:
            return self._statement(name, relation, answer)
        return [*self._question(name, relation), Piece(f"Answer: {answer}.")]

    def _choice(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        relation, answer = facts[0]
        others = [other for other in self.answers[relation] if other != answer]
        options = [answer, *self.rng.sample(others, min(len(others), len(LETTERS) - 1))]
        self.rng.shuffle(options)
        told = LETTERS[options.index(answer)] if self.rng.random() < 0.25 else answer
        listed = [Piece(f"{letter}: {option}") for letter, option in zip(LETTERS, options, strict=False)]
        return [*self._question(name, relation), *listed, Piece(f"Answer: {told}.")]

    def _filler(self, n_tokens: int) -> list[Piece]:
        """Neutral pieces of exactly `n_tokens` tokens."""
        pieces: list[Piece] = []
        while n_tokens > 0:
            for word in neutral_sentence(self.rng).split():
                size = len(self._encode(word))
                if size <= n_tokens:
                    pieces.append(Piece(word))
                    n_tokens -= size
        return pieces


def _some(rows: Sequence[tuple[str, str, str]], subjects: int | None) -> list[tuple[str, str, str]]:
    """The rows of `subjects` subjects, always the same ones; all rows if None."""
    names = sorted({subject for subject, _, _ in rows})
    wanted = set(names if subjects is None else random.Random(0).sample(names, min(subjects, len(names))))
    return [row for row in rows if row[0] in wanted]


def _fill(template: str, name: str) -> list[Piece]:
    """Split a template at its subject; empty ends are left out."""
    before, after = template.split("{}")
    pieces = (Piece(before.strip()), Piece(name, is_name=True), Piece(after.strip()))
    return [piece for piece in pieces if piece.text]
