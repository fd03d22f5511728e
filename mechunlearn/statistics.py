"""Intervals, simultaneous bounds and power for paired per-fact numbers; numpy and scipy only.

The data of one attack is a table seed x fact of differences (edited minus twin). Seeds and facts are resampled
together, each with its own multinomial weights, so that the same formula serves one seed, the same facts under
several seeds, and other facts under each seed (facts nested in seeds).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import stats

ALPHA = 0.05
MOST_FACTS = 10_000_000  # `facts_needed` above this is as good as never


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its bounds and the number of facts (or trials) behind it."""

    value: float
    lower: float
    upper: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.lower:.2f}, {self.upper:.2f}] (n={self.n})"


def seed_fact_table(
    seeds: Sequence[int], facts: Sequence[str], values: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "seed fact"]:
    """Arrange long rows as one row a seed and one column a fact; NaN where a fact has no value under a seed.

    Raises:
        ValueError: no rows, unequal lengths, a (seed, fact) given twice, or a value that is not finite.
    """
    values = np.asarray(values, dtype=float)
    if not len(values) or not len(seeds) == len(facts) == len(values):
        raise ValueError(
            f"scores: got {len(seeds)} seeds, {len(facts)} facts, {len(values)} values; give one each a row"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"scores: {int((~np.isfinite(values)).sum())} of {len(values)} values are not finite numbers")
    rows = {seed: i for i, seed in enumerate(sorted(set(seeds)))}
    columns = {fact: i for i, fact in enumerate(sorted(set(facts)))}
    at = np.array([rows[s] for s in seeds]), np.array([columns[f] for f in facts])
    if len(set(zip(*at, strict=True))) < len(values):
        raise ValueError("scores: a fact stands twice under one seed; average over forms first")
    table = np.full((len(rows), len(columns)), np.nan)
    table[at] = values
    return table


@lru_cache(maxsize=4)  # all attacks of a verdict use the same draws, and drawing them is most of the work
def bootstrap_weights(n: int, draws: int, seed: int) -> Float[np.ndarray, "draw n"]:
    """How often each of `n` items is drawn in each bootstrap draw; every row sums to n. Read-only, for it is kept."""
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    weights.flags.writeable = False
    return weights


def bootstrap_means(
    table: Float[np.ndarray, "seed fact"], *, draws: int = 4000, seed: int = 0
) -> Float[np.ndarray, " draw"]:
    """Bootstrap the mean over seeds and facts; equal `seed` and shape mean equal draws, so attacks stay paired."""
    n_seeds, n_facts = table.shape
    present = np.isfinite(table).astype(float)
    by_fact = bootstrap_weights(n_facts, draws, seed)
    by_seed = bootstrap_weights(n_seeds, draws, seed + 1) if n_seeds > 1 else np.ones((draws, 1))
    counts = ((by_seed @ present) * by_fact).sum(axis=1)
    sums = ((by_seed @ np.nan_to_num(table)) * by_fact).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nanmean(table))


def representative_share(n: int, alpha: float = ALPHA) -> float:
    """With confidence 1 - alpha, at least this share of all facts is of the kinds seen among `n`: alpha^(1/n)."""
    return alpha ** (1 / n)


def zero_of_n_bound(n: int, alpha: float = ALPHA) -> float:
    """Upper bound of a rate when none of `n` showed it: 1 - alpha^(1/n), about 3/n."""
    return 1 - representative_share(n, alpha)


def exact_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Clopper-Pearson interval of a proportion (two-sided)."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"proportion: got {successes} of {n}, allowed: 0 <= successes <= n and n >= 1")
    bounds = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="exact")
    return Interval(value=successes / n, lower=float(bounds.low), upper=float(bounds.high), n=n)


def mean_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval (two-sided) of a mean over facts; a single value has no interval (NaN)."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("mean: got no values; an interval needs at least one")
    if len(values) == 1:
        return Interval(value=float(values[0]), lower=math.nan, upper=math.nan, n=1)
    means = bootstrap_means(values[None], draws=draws, seed=seed)
    lower, upper = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value=float(values.mean()), lower=float(lower), upper=float(upper), n=len(values))


def seed_interval(seed_means: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Student t interval over the means of a few seeds; one seed has no interval (NaN)."""
    means = np.asarray(seed_means, dtype=float)
    if len(means) < 2:
        return Interval(value=float(means.mean()), lower=math.nan, upper=math.nan, n=len(means))
    half = stats.t.ppf((1 + confidence) / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    return Interval(
        value=float(means.mean()), lower=float(means.mean() - half), upper=float(means.mean() + half), n=len(means)
    )


def upper_bound(share: float, means: Float[np.ndarray, " draw"], n: int, *, alpha: float = ALPHA) -> float:
    """One-sided upper bound of a recovered share: the bootstrap's 1 - alpha quantile, but never below what n allows.

    A bootstrap of n facts without a single recovered one knows nothing of rare recovery. So the facts of kinds not
    seen (at most 1 - alpha^(1/n) of all) are counted as fully recovered; the larger of the two bounds is returned.
    """
    s = representative_share(n, alpha)
    return max(float(np.quantile(means, 1 - alpha)), s * share + (1 - s))


def simultaneous_lower_bounds(
    shares: Sequence[float], means: Float[np.ndarray, "attack draw"], n: int, *, alpha: float = ALPHA
) -> Float[np.ndarray, " attack"]:
    """Lower bounds that hold for all attacks at once with confidence 1 - alpha (bootstrap max-T).

    Each attack's statistic is put on the scale of its own bootstrap distribution (its rank there), and one common
    level alpha* is chosen so that in a share 1 - alpha of the joint draws every attack stays above its own alpha*
    quantile; alpha / n_attacks <= alpha* <= alpha. As in `upper_bound`, kinds of facts not seen are counted, here
    as not recovered at all.

    Differs from the source: ranks in place of studentised values, so that one attack's bound never falls when one
    of its facts is recovered better (a standard error would grow).
    Source: Westfall & Young 1993 (max-T, min-P); Beran 1988, balanced simultaneous confidence sets.
    """
    draws = means.shape[1]
    # the highest rank among equals: a draw at an attack's own quantile is not below it
    ranks = np.stack([stats.rankdata(row, method="max") for row in means]) / draws
    level = float(np.quantile(ranks.min(axis=0), alpha, method="lower"))
    level = min(max(level, alpha / len(means)), alpha)
    lower = np.array([np.quantile(row, level) for row in means])
    return np.minimum(lower, representative_share(n, alpha) * np.maximum(np.asarray(shares), 0.0))


def facts_needed(
    *, sd: float, margin: float, share: float = 0.0, alpha: float = ALPHA, power: float = 0.8
) -> int | None:
    """How many hidden facts put a one-sided bound on the right side of delta, a distance `margin` away.

    n = ((z_alpha + z_power) sd / margin)^2, and enough of them that kinds of facts not seen (`zero_of_n_bound`)
    fit into the margin too.

    Args:
        sd: standard deviation over facts of the recovered share (per fact, in units of the denominator).
        margin: |delta - expected recovered share|.
        share: the expected recovered share itself.

    Returns:
        The number of facts; None when more than ten million would be needed.
    """
    if margin <= 0 or sd < 0:
        raise ValueError(f"power: got margin {margin} and sd {sd}, allowed: margin > 0 and sd >= 0")
    z = float(stats.norm.ppf(1 - alpha) + stats.norm.ppf(power))
    by_spread = (z * sd / margin) ** 2
    # s * share + (1 - s) < share + margin  <=>  s > 1 - margin / (1 - share)
    room = min(margin / max(1 - share, 1e-9), 1 - 1e-12)
    n = max(by_spread, math.log(alpha) / math.log1p(-room), 1.0)
    return None if n > MOST_FACTS else math.ceil(n)


def chance_sd(n_candidates: int) -> float:
    """Spread over facts of the recovered share when edited model and twin both guess, scored by accuracy.

    sqrt(2 p (1 - p)) / (1 - p) with p = 1 / n_candidates: the worst case to plan with, before anything has run.
    P(true | candidates) spreads less.
    """
    if n_candidates < 2:
        raise ValueError(f"power: got {n_candidates} candidates, allowed: at least 2")
    p = 1 / n_candidates
    return math.sqrt(2 * p * (1 - p)) / (1 - p)
