"""How alike two rankings of the same things are, and how alike the rankings of drawn items are."""

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's; NaN where one side is constant."""
    return float("nan") if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def bootstrap_rankings(
    sums: Float[np.ndarray, "item n"], counts: Float[np.ndarray, " item"], *, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Draw items with replacement and correlate the ranking of their mean with that of all items' mean.

    Args:
        sums, counts: what each item adds up to, and of how many values, so that large items count for more.

    Returns:
        Mean and 5% quantile of Spearman's correlations over draws. NaN where nothing is drawn: one item, items that are
        all the same (a score that is one for all facts says nothing of other facts), or a constant ranking.
    """
    whole, means = sums.sum(axis=0) / counts.sum(), sums / counts[:, None]
    if len(counts) < 2 or (means == means[0]).all() or np.ptp(whole) == 0:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    found = [rank_correlation(sums[rows].sum(axis=0) / counts[rows].sum(), whole) for rows in drawn]
    return float(np.mean(found)), float(np.quantile(found, 0.05))
