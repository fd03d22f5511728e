"""Would other subjects, or other words, have given the same ranking?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.html_card import html_card
from mechunlearn.rankings import bootstrap_rankings, rank_correlation


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Rank correlations (Spearman) between rankings of components; NaN where nothing can be compared."""

    subjects: float
    """Mean over bootstrap draws of the subjects, against the ranking from all; NaN where all facts have one score."""
    subjects_lower: float
    """Their 5% quantile."""
    n_subjects: int
    forms: float
    """Mean over pairs of prompt forms."""
    n_forms: int

    def _repr_html_(self) -> str:
        rows = [("subjects", self.subjects, self.subjects_lower, self.n_subjects)]
        rows += [("forms of the prompt", self.forms, "", self.n_forms)] if self.n_forms > 1 else []
        return html_card("stability of the ranking", {}, [("over", "rank correlation", "5% quantile", "n"), *rows])


def stability(
    facts: Sequence[Fact],
    scores: ComponentScores,
    localizer: Callable[..., ComponentScores] | None = None,
    *,
    model: Any = None,
    options: Mapping[str, Any] | None = None,
    max_forms: int = 3,
    draws: int = 200,
    seed: int = 0,
) -> Stability:
    """Draw subjects with replacement from the scores, and score again with other forms of the prompt.

    Args:
        facts: those that were scored, in their order.
        localizer, model, options: what made the scores; without them forms are not compared.
        max_forms: how many forms, the prompt itself among them; each costs another run.

    Raises:
        ValueError: other facts than were scored.
    """
    if len(facts) != scores.n_facts:
        raise ValueError(f"stability: got {len(facts)} facts, allowed: the {scores.n_facts} that were scored")
    by_subject: dict[str, list[int]] = {}
    for row, fact in enumerate(facts):
        by_subject.setdefault(fact.subject, []).append(row)
    sums = np.stack([scores.per_fact[rows].sum(axis=(0, 2)) for rows in by_subject.values()])
    counts = np.array([len(rows) for rows in by_subject.values()])
    subjects, lower = bootstrap_rankings(sums, counts, draws=draws, seed=seed)
    rankings = [scores.values]
    n = min([max_forms, *(1 + len(fact.paraphrases) for fact in facts)])
    if localizer is not None:
        for form in range(n - 1):
            again = [replace(fact, prompt=fact.paraphrases[form]) for fact in facts]
            rankings.append(localizer(model, again, **(options or {})).values)
    between = [rank_correlation(a, b) for a, b in combinations(rankings, 2)]
    return Stability(
        subjects=subjects, subjects_lower=lower, n_subjects=len(counts),
        forms=float(np.mean(between)) if between else float("nan"), n_forms=len(rankings),
    )  # fmt: skip
