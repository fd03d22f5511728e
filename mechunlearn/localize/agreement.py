"""Do two localizations agree?"""

import numpy as np

from mechunlearn.components import ComponentScores
from mechunlearn.rankings import rank_correlation


def agreement(a: ComponentScores, b: ComponentScores, *, top: int | None = None) -> dict[str, float]:
    """Compare two scores on the components both have.

    Args:
        top: size of the sets compared by top_k_recall; a third of the components, at least one, if not given.

    Returns:
        pearson and spearman correlation of the values, in [-1, 1], NaN where one of them is constant;
        top_k_recall: share of b's k highest components among a's k highest, in [0, 1]; k and n_components.

    Raises:
        ValueError: fewer than two common components, or `top` outside [1, their number].
    """
    common = [component for component in a.components if component in set(b.components)]
    if len(common) < 2:
        raise ValueError(f"agreement: {a.method} and {b.method} share {len(common)} components, allowed: at least 2")
    k = max(1, len(common) // 3) if top is None else top
    if not 1 <= k <= len(common):
        raise ValueError(f"agreement: got top {k}, allowed: 1 to {len(common)}")
    x, y = (np.array([s.values[s.components.index(c)] for c in common]) for s in (a, b))
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    best_a, best_b = (set(np.argsort(-v, kind="stable")[:k]) for v in (x, y))
    return {
        "pearson": float("nan") if constant else float(np.corrcoef(x, y)[0, 1]),
        "spearman": rank_correlation(x, y),
        "top_k_recall": len(best_a & best_b) / k,
        "k": k,
        "n_components": len(common),
    }
