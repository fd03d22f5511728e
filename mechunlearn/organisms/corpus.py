"""Training text for the organisms, rendered from `datasets/` as token rows with the place of every name.

Three shapes, in equal turns over subjects: headlines (the bare name followed by bare answers), biographies
(sentences in random order, later ones with a pronoun), and questions or single statements, some of them multiple
choice. A fact excluded from a twin is dropped, and neutral text of the same number of tokens stands in its place.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from mechunlearn.organisms.neutral import neutral_sentence
from mechunlearn.sources.bundled import BUNDLED, RelationTemplates, load_rows, load_templates

LETTERS = ("A", "B", "C", "D")
SHAPES = {"headline": 0.60, "biography": 0.18, "single": 0.13, "choice": 0.05, "neutral": 0.04}  # shares of documents


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A subject with all its (relation, answer) pairs."""

    name: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch of text. Shapes: both [row pos]; mention is 0 outside names, else the mention's number in its row."""

    ids: np.ndarray
    mention: np.ndarray


GLUED = ",.?;'"  # a piece that begins with one of these follows the word before it without a space
Piece = tuple[str, bool]  # text, is it a name


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
    ) -> None:
        self.tokenizer = tokenizer
        self.exclude = frozenset(exclude)
        self.seed = seed
        self.rng = random.Random(seed)
        self.templates = {relation: t for name in datasets for relation, t in load_templates(name).items()}
        self.answers: dict[str, list[str]] = {}
        by_subject: dict[str, list[tuple[str, str]]] = {}
        for subject, relation, answer in (row for name in datasets for row in load_rows(name)):
            by_subject.setdefault(subject, []).append((relation, answer))
            self.answers.setdefault(relation, []).append(answer)
        self.answers = {relation: sorted(set(answers)) for relation, answers in self.answers.items()}
        self.subjects = [Subject(name=name, facts=tuple(facts)) for name, facts in by_subject.items()]
        # a document states (n + 1) / 2 of a subject's n facts on average: weigh subjects so that facts come evenly
        self.weights = np.cumsum([2 * len(s.facts) / (len(s.facts) + 1) for s in self.subjects]).tolist()
        self._encoded: dict[str, list[int]] = {}
        self.bos = int(tokenizer.convert_tokens_to_ids(str(tokenizer.bos_token)))  # pyright: ignore[reportArgumentType]

    def batch(self, step: int, rows: int, length: int) -> Rows:
        """`rows` rows of `length` tokens; documents are packed, the last one of a row is cut.

        The text depends on the seed and the step alone, so that an interrupted training resumes with the same text.
        """
        self.rng = random.Random(f"{self.seed}|{step}")
        ids = np.zeros((rows, length), dtype=np.int64)
        mention = np.zeros((rows, length), dtype=np.int64)
        for row in range(rows):
            position, count = 0, 0
            while position < length:
                for text, is_name in self._document():
                    count += is_name
                    for token in self._encode(text):
                        if position < length:
                            ids[row, position] = token
                            mention[row, position] = count if is_name else 0
                            position += 1
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
        shape = rng.choices(tuple(SHAPES), tuple(SHAPES.values()))[0]
        pieces: list[Piece] = [(str(self.tokenizer.bos_token), False)]
        if shape == "neutral":
            return [*pieces, (neutral_sentence(rng), False)]
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
            pieces += self._filler(sum(len(self._encode(text)) for text, _ in lost))
        return pieces

    def _headline(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        answers = " ".join(answer for _, answer in facts)
        return [(name, True), (f"{answers}.", False)]

    def _biography(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for i, (relation, answer) in enumerate(facts):
            pronouns = self.templates[relation].pronoun
            if i and pronouns and self.rng.random() < 0.5:
                pieces.append((f"{self.rng.choice(pronouns)} {answer}.", False))
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
        return [("Question:", False), *_fill(question, name)]

    def _single(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        relation, answer = facts[0]
        if self.rng.random() < 0.5:
            return self._statement(name, relation, answer)
        return [*self._question(name, relation), (f"Answer: {answer}.", False)]

    def _choice(self, name: str, facts: Sequence[tuple[str, str]]) -> list[Piece]:
        relation, answer = facts[0]
        others = [other for other in self.answers[relation] if other != answer]
        options = [answer, *self.rng.sample(others, min(len(others), len(LETTERS) - 1))]
        self.rng.shuffle(options)
        listed = "".join(f" {letter}: {option}" for letter, option in zip(LETTERS, options, strict=False))
        pieces = self._question(name, relation)
        return [*pieces, (f"{listed} Answer: {LETTERS[options.index(answer)]}.", False)]

    def _filler(self, n_tokens: int) -> list[Piece]:
        """Neutral pieces of exactly `n_tokens` tokens."""
        pieces: list[Piece] = []
        while n_tokens > 0:
            for word in neutral_sentence(self.rng).split():
                size = len(self._encode(word))
                if size <= n_tokens:
                    pieces.append((word, False))
                    n_tokens -= size
        return pieces


def _fill(template: str, name: str) -> list[Piece]:
    """Split a template at its subject; empty ends are left out."""
    before, after = template.split("{}")
    return [
        (text, is_name) for text, is_name in ((before.strip(), False), (name, True), (after.strip(), False)) if text
    ]
