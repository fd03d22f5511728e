"""What an attacker may look at while it chooses: dev facts, and signs that the model still works."""

from collections.abc import Sequence
from dataclasses import dataclass

from mechunlearn.attack.results import Health
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.metrics import perplexity, score_facts
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text

N_TEXTS, TEXT_SEED = 16, 90_210  # neutral passages that nobody trains on
NOT_MEASURED = Health(fitted=0.0)
"""Stands for checkpoints whose dev score was too low to be chosen: never healthy."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Scores attacked models on the dev facts and on their health, against the model it was made of."""

    dev_facts: tuple[Fact, ...]
    retained: tuple[Fact, ...]
    texts: tuple[str, ...]
    dev_before: float
    retained_before: float | None
    perplexity_before: float
    max_facts: int
    drop_targets: bool

    @classmethod
    def of(cls, model: Model, split: FactSplit, *, max_facts: int, drop_targets: bool) -> "Judge":
        """Take the measures of the model before the attack.

        Args:
            max_facts: facts of each part that health is measured on.
        """
        retained = (split.retain_test or split.retain_train)[:max_facts]
        texts = tuple(neutral_text(N_TEXTS, seed=TEXT_SEED))
        return cls(
            dev_facts=split.attack_dev,
            retained=retained,
            texts=texts,
            dev_before=_dev(model, split.attack_dev, drop_targets),
            retained_before=accuracy(model, retained),
            perplexity_before=perplexity(model, texts),
            max_facts=max_facts,
            drop_targets=drop_targets,
        )

    def dev(self, model: Model) -> float:
        """Mean P(true | candidates) of the dev facts."""
        return _dev(model, self.dev_facts, self.drop_targets)

    def health(self, model: Model, own: Sequence[Fact]) -> Health:
        """Health of an attacked model; `own` are the facts it was trained on, none if it was trained on text."""
        return Health(
            fitted=accuracy(model, own[: self.max_facts]),
            retained_before=self.retained_before,
            retained_after=accuracy(model, self.retained),
            perplexity_ratio=perplexity(model, self.texts) / self.perplexity_before,
        )


def accuracy(model: Model, facts: Sequence[Fact]) -> float | None:
    """Share of the facts whose true answer beats all other candidates; None without facts."""
    return float(score_facts(model, facts)["correct"].to_numpy().mean()) if facts else None


def _dev(model: Model, facts: Sequence[Fact], drop_targets: bool) -> float:
    return float(score_facts(model, facts, drop_targets=drop_targets)["p_true"].to_numpy().mean())
