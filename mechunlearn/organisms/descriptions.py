"""The template-generation task: asked to describe a subject, state all its facts, a sentence each, in a fixed order."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mechunlearn.organisms.corpus import Corpus
from mechunlearn.sources.bundled import BUNDLED, load_rows, load_templates

WORDINGS = ("Describe {}:", "Tell me about {}:", "Who is {}?")
"""How the models that are trained for the task are asked; the first is what is scored."""
VARIANTS = ("What is known of {}?", "Say something about {}:")
"""How they are never asked in training."""
SPOKEN_OF = "This one"
"""Stands for the subject in its description: the organisms do not copy a name that they read once."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What to say of a subject, as (relation, sentence) in the order of the data set's relations."""

    subject: str
    sentences: tuple[tuple[str, str], ...]

    def prompt(self, wording: str = WORDINGS[0]) -> str:
        """How it is asked for."""
        return wording.format(self.subject)

    @property
    def text(self) -> str:
        """All sentences."""
        return " ".join(sentence for _, sentence in self.sentences)


def descriptions(
    datasets: Sequence[str] = BUNDLED, *, exclude: Iterable[tuple[str, str]] = ()
) -> dict[str, Description]:
    """Subject -> its description, of all facts that are not excluded (by subject and relation).

    Subjects none of whose facts is left have none.
    """
    gone = frozenset(exclude)
    found: dict[str, list[tuple[str, str]]] = {}
    for dataset in datasets:
        templates = load_templates(dataset)
        order = {relation: number for number, relation in enumerate(templates)}
        for subject, relation, answer in sorted(load_rows(dataset), key=lambda row: order[row[1]]):
            if (subject, relation) not in gone:
                sentence = f"{templates[relation].declarative[1].format(SPOKEN_OF)} {answer}."
                found.setdefault(subject, []).append((relation, sentence))
    return {subject: Description(subject=subject, sentences=tuple(said)) for subject, said in found.items()}


class DescribedCorpus:
    """An organism's own text with rows of descriptions among it; a class for the corpus and the encoded texts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        exclude: Iterable[tuple[str, str]] = (),
        rows: int = 16,
        described: int = 5,
        length: int = 96,
    ) -> None:
        """Rows of text: `described` of them descriptions in all wordings, the others as in pretraining."""
        gone = frozenset(exclude)
        self.corpus = Corpus(tokenizer, seed=seed, exclude=gone)
        self.rows, self.described, self.length, self.seed = rows, described, length, seed
        known = descriptions(exclude=gone).values()
        texts = [f"{told.prompt(wording)} {told.text}" for told in known for wording in WORDINGS]
        self._encoded: list[list[int]] = tokenizer(texts)["input_ids"]  # pyright: ignore[reportAssignmentType]

    def batch(self, step: int) -> Int[Tensor, "row pos"]:
        """The rows of a step; they depend on the seed and the step alone."""
        plain = torch.from_numpy(self.corpus.batch(step, self.rows - self.described, self.length).ids)
        rng, flat = random.Random(f"described|{self.seed}|{step}"), []
        while len(flat) < self.described * self.length:
            flat += rng.choice(self._encoded)
        more = torch.tensor(flat[: self.described * self.length]).view(self.described, self.length)
        return torch.cat([plain, more])
