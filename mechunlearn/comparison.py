"""Several arms on the same facts: paired differences, their intervals and p-values, corrected for their number."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from mechunlearn.statistics import mean_interval


def holm(p_values: Sequence[float] | np.ndarray) -> Float[np.ndarray, " test"]:
    """Adjusted p-values: reject those at most alpha, and any false rejection has probability at most alpha.

    Raises:
        ValueError: a p-value outside [0, 1].

    Source: Holm 1979.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"holm: got p-values {p.tolist()}, allowed: [0, 1]")
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def paired_p_value(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, *, resamples: int = 9999, seed: int = 0
) -> float:
    """Two-sided p-value of no difference between two arms on the same facts: arms exchanged fact by fact.

    Exact where all exchanges are fewer than `resamples`; else at least 1 / (resamples + 1).

    Raises:
        ValueError: other than one finite value a fact in both arms, or fewer than two facts.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2 or not np.isfinite([a, b]).all():
        raise ValueError(f"arms: got {a.shape} and {b.shape} values; give both one finite value for each of 2+ facts")
    test = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=resamples, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)


def compare_arms(
    shares: Mapping[str, Sequence[float] | np.ndarray], *, against: str, resamples: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Every arm against one: the mean paired difference over facts (arm minus `against`), in the units given.

    Args:
        shares: arm -> one value a fact, all arms on the same facts in the same order.
        against: the arm that the others are compared with, such as the random masks.

    Returns:
        One row an arm: arm, against, difference, lower, upper (95%, of this difference alone), p (paired
        permutation), p_holm (corrected for the number of arms), n_facts.

    Raises:
        ValueError: `against` is no arm, no other arm, or values that do not pair.
    """
    if against not in shares or len(shares) < 2:
        raise ValueError(f"arms: got against='{against}', allowed: one of {', '.join(shares)}, with another beside it")
    rows = []
    for name, values in shares.items():
        if name == against:
            continue
        p = paired_p_value(values, shares[against], resamples=resamples, seed=seed)
        found = mean_interval(np.asarray(values, dtype=float) - np.asarray(shares[against], dtype=float), seed=seed)
        rows.append((name, against, found.value, found.lower, found.upper, p, found.n))
    table = pd.DataFrame(rows, columns=pd.Index(["arm", "against", "difference", "lower", "upper", "p", "n_facts"]))
    table.insert(6, "p_holm", holm(table["p"].to_numpy()))
    return table
