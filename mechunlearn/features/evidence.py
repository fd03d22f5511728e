"""What guards are made on: the features of texts to forget and of texts to retain, read once for any number of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechunlearn.facts import FactSplit, hash_facts
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.statistics import FeatureStatistics, feature_statistics
from mechunlearn.features.texts import RetainedKind, kinds_of, retained_texts, statements
from mechunlearn.models import Model

Flags = list[tuple[Tensor, Tensor]]
"""Of each text: at which tokens a chosen feature is on, and which are content."""


@dataclass(kw_only=True, eq=False)
class Fired:
    """Which features are on at every token of some texts; only those that are take memory."""

    content: dict[int, Bool[Tensor, " pos"]] = field(default_factory=dict)
    """Text -> which of its tokens are content."""
    hits: dict[int, Int[Tensor, "hit two"]] = field(default_factory=dict)
    """Text -> (token, feature), of every feature that is on."""

    def note(
        self, numbers: Sequence[int], on: Bool[Tensor, "text pos d_sae"], content: Bool[Tensor, "text pos"]
    ) -> None:
        """Take up a batch of texts."""
        for row, number in enumerate(numbers):
            self.content[number] = content[row].cpu()
            self.hits[number] = torch.nonzero(on[row]).int().cpu()

    def flags(self, chosen: Sequence[int], d_sae: int) -> Flags:
        """Where one of the chosen features is on, text by text."""
        is_chosen = torch.zeros(d_sae, dtype=torch.bool)
        is_chosen[list(chosen)] = True
        found: Flags = []
        for number in range(len(self.content)):
            token, feature = self.hits[number].long().T
            on = torch.zeros_like(self.content[number])
            on[token[is_chosen[feature]]] = True
            found.append((on, self.content[number]))
        return found


def fired_in(model: Model, dictionary: Dictionary, texts: Sequence[str]) -> tuple[FeatureStatistics, Fired]:
    """Count the features of a dictionary over texts, and note where each is on."""
    fired = Fired()
    return feature_statistics(model, dictionary, texts, on_batch=fired.note), fired


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """Of the texts to retain a half is counted; the gate is calibrated, and its rate measured, on the other."""

    dictionary: Dictionary
    seed: int
    forget: FeatureStatistics
    retain: FeatureStatistics
    fired_forget: Fired
    fired_retain: Fired
    """On the half that was not counted."""
    kinds: tuple[RetainedKind, ...]
    """Of the texts of `fired_retain`: statements near to the facts to forget, far from them, or other text."""
    texts: tuple[str, ...]
    """All of them, for describing features."""
    facts_sha256: str


def gather_evidence(
    model: Model, split: FactSplit, dictionary: Dictionary, *, data_share: float = 1.0, seed: int = 0
) -> Evidence:
    """Read every statement of the facts to forget and to retain, and neutral passages, once.

    Args:
        data_share: share of the statements to forget and of the texts to retain that are read.
        seed: draws the share, and which texts are counted.

    Raises:
        ValueError: a dictionary that does not fit.
    """
    rng = random.Random(f"guard|{seed}")
    forget = _some(statements(split.forget, seed=seed), data_share, rng)
    retain = _some(retained_texts(split.retain_train, seed=seed), data_share, rng)
    half = len(retain) // 2
    of_forget, fired_forget = fired_in(model, dictionary, forget)
    of_retain = feature_statistics(model, dictionary, retain[:half])
    _, fired_retain = fired_in(model, dictionary, retain[half:])
    return Evidence(
        dictionary=dictionary, seed=seed, forget=of_forget, retain=of_retain,
        fired_forget=fired_forget, fired_retain=fired_retain, texts=(*forget, *retain),
        kinds=kinds_of(retain[half:], split.retain_train, {fact.relation for fact in split.forget}, seed=seed),
        facts_sha256=hash_facts((*split.forget, *split.retain_train)),
    )  # fmt: skip


def _some(texts: Sequence[str], share: float, rng: random.Random) -> list[str]:
    return list(texts) if share == 1 else rng.sample(list(texts), max(1, round(share * len(texts))))
