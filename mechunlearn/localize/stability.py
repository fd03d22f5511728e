"""Would other subjects, or other words, have given the same ranking?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.html_card import html_card


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Rank correlations (Spearman) between rankings of components; NaN where nothing can be compared."""

    subjects: float
    """Mean over bootstrap draws of the subjects, against the ranking from all."""
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
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(counts), size=(draws, len(counts)))
    found = [_rank_correlation(sums[c].sum(0) / counts[c].sum(), scores.values) for c in chosen]
    rankings = [scores.values]
    n = min([max_forms, *(1 + len(fact.paraphrases) for fact in facts)])
    if localizer is not None:
        for form in range(n - 1):
            again = [replace(fact, prompt=fact.paraphrases[form]) for fact in facts]
            rankings.append(localizer(model, again, **(options or {})).values)
    between = [_rank_correlation(a, b) for a, b in combinations(rankings, 2)]
    enough = len(counts) > 1
    return Stability(
        subjects=float(np.mean(found)) if enough else float("nan"),
        subjects_lower=float(np.quantile(found, 0.05)) if enough else float("nan"), n_subjects=len(counts),
        forms=float(np.mean(between)) if between else float("nan"), n_forms=len(rankings),
    )  # fmt: skip


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, NaN where one side is constant."""
    return float("nan") if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
