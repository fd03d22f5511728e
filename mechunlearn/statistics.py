"""Intervals and simultaneous bounds for paired per-fact numbers; numpy and scipy only.

The data of one attack is a table seed x fact of differences (edited minus twin). Facts are resampled by the Bayesian
bootstrap. Seeds are few, and resampling few of anything gives intervals that are too narrow, so what the seeds add is
drawn from Student's t. `bench/coverage.py` measures how often each interval here holds the truth.
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
    """Weights of `n` items in each draw, uniform over all that sum to n. Read-only, for they are kept.

    Source: Rubin 1981, the Bayesian bootstrap.
    """
    weights = np.random.default_rng(seed).standard_exponential((draws, n))
    weights *= n / weights.sum(axis=1, keepdims=True)
    weights.flags.writeable = False
    return weights


@lru_cache(maxsize=4)
def _t_multipliers(n: int, draws: int, seed: int) -> Float[np.ndarray, "draw n"]:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((draws, n))
    normal -= normal.mean(axis=1, keepdims=True)
    return normal / np.sqrt(n * rng.chisquare(n - 1, size=(draws, 1)))


def t_deviations(values: Float[np.ndarray, " item"], *, draws: int, seed: int) -> Float[np.ndarray, " draw"]:
    """Draws of the error of a mean: Student t with n - 1 degrees of freedom times the standard error.

    Equal `seed` and n mean equal multipliers, so the draws of several attacks are correlated as their values are.
    """
    return _t_multipliers(len(values), draws, seed) @ (values - values.mean())


def bootstrap_means(
    table: Float[np.ndarray, "seed fact"], *, draws: int = 4000, seed: int = 0
) -> Float[np.ndarray, " draw"]:
    """Draws of the mean over facts and seeds; equal `seed` and shape mean equal draws, so attacks stay paired.

    One seed: the Bayesian bootstrap over facts. The same facts under several seeds: the same, plus what the seeds add
    (`t_deviations` of the seed means). Other facts under every seed: the seed means alone, for they hold the spread
    over facts already. Never falls when a value of a one-seed table rises.
    """
    present = np.isfinite(table)
    per_fact, per_seed, n = present.sum(axis=0), present.sum(axis=1), present.sum()
    mean = float(np.nanmean(table))
    means = np.full(draws, mean)
    if len(table) == 1 or per_fact.max() > 1:
        weights = bootstrap_weights(table.shape[1], draws, seed)
        means = weights @ np.nansum(table, axis=0) / (weights @ per_fact)
    if len(table) > 1:
        pulls = (np.nansum(table, axis=1) - per_seed * mean) * len(table) / n
        means = means + t_deviations(pulls, draws=draws, seed=seed + 1)
    return means


def representative_share(n: int, alpha: float = ALPHA) -> float:
    """With confidence 1 - alpha, at least this share of all facts is of the kinds seen among `n`: alpha^(1/n)."""
    return alpha ** (1 / n)


def zero_of_n_bound(n: int, alpha: float = ALPHA) -> float:
    """Upper bound of a rate when none of `n` showed it: 1 - alpha^(1/n), about 3/n."""
    return 1 - representative_share(n, alpha)


@lru_cache(maxsize=8)
def _unseen_weights(n: int, draws: int) -> Float[np.ndarray, " draw"]:
    """Draws of Beta(1, n), the weight of one item more; its quantiles in random order, so the bounds are exact."""
    quantiles = 1 - ((np.arange(draws) + 0.5) / draws) ** (1 / n)
    return np.random.default_rng(n).permutation(quantiles)


def exact_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Clopper-Pearson interval of a proportion (two-sided)."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"proportion: got {successes} of {n}, allowed: 0 <= successes <= n and n >= 1")
    bounds = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="exact")
    return Interval(value=successes / n, lower=float(bounds.low), upper=float(bounds.high), n=n)


def mean_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Two-sided interval of a mean over facts; a single value has no interval (NaN).

    Values within [0, 1], or within [-1, 1], are taken to be bounded so: both bounds are those of `upper_bound` with
    an unseen value at the limit. For hits and misses this is Clopper-Pearson, so all hits have an interval too.
    Values of any other kind: Student's t.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("mean: got no values; an interval needs at least one")
    mean, n, most = float(values.mean()), len(values), float(np.abs(values).max())
    if n == 1 or not most <= 1:
        return seed_interval(values, confidence=confidence)
    means, alpha = bootstrap_means(values[None], draws=draws, seed=seed), (1 - confidence) / 2
    upper = upper_bound(mean, means, n, alpha=alpha)
    lower = -upper_bound(-mean, -means, n, top=0.0 if values.min() >= 0 else 1.0, alpha=alpha)
    return Interval(value=mean, lower=lower, upper=upper, n=n)


def seed_interval(seed_means: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Student t interval over the means of a few seeds; one seed has no interval (NaN)."""
    means = np.asarray(seed_means, dtype=float)
    if len(means) < 2:
        return Interval(value=float(means.mean()), lower=math.nan, upper=math.nan, n=len(means))
    half = stats.t.ppf((1 + confidence) / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    return Interval(
        value=float(means.mean()), lower=float(means.mean() - half), upper=float(means.mean() + half), n=len(means)
    )


@dataclass(frozen=True, kw_only=True)
class SeedFactInterval(Interval):
    """An interval over seeds and facts, with the method that made it and why that one. `n` counts facts."""

    method: str
    why: str


def hierarchical_interval(
    table: Float[np.ndarray, "seed fact"], *, confidence: float = 0.95, draws: int = 4000, seed: int = 0
) -> SeedFactInterval:
    """Two-sided interval of a mean over seeds and facts (NaN: no value), by the design the table shows.

    - one seed: `mean_interval`, over facts only;
    - other facts under every seed: Student's t over the seed means, no narrower than `mean_interval` of all facts;
    - the same facts under several seeds: the draws of `bootstrap_means`. Student's t over the seed means would leave
      out that the facts are a sample; a bootstrap of seeds and facts would be too narrow (of nominal 95%, 5 seeds
      hold 83%, 8 seeds 89%, 30 seeds 93%, where the seeds are all of the spread).

    Raises:
        ValueError: no values.
    """
    present = np.isfinite(table)
    if not present.any():
        raise ValueError(f"mean: got a table {table.shape[0]} x {table.shape[1]} of no values; give at least one")
    rows = table[present.any(axis=1)][:, present.any(axis=0)]
    n_seeds, n = rows.shape
    if n_seeds == 1:
        found = mean_interval(rows[0], confidence=confidence, draws=draws, seed=seed)
        method, why = "bootstrap over facts", "one seed: how seeds differ is not known"
    elif np.isfinite(rows).sum(axis=0).max() == 1:
        by_seed = seed_interval(np.nanmean(rows, axis=1), confidence=confidence)
        facts = mean_interval(rows[np.isfinite(rows)], confidence=confidence, draws=draws, seed=seed)
        lower, upper = min(by_seed.lower, facts.lower), max(by_seed.upper, facts.upper)
        found = Interval(value=by_seed.value, lower=lower, upper=upper, n=n)
        method, why = "t over seed means", f"other facts under each of {n_seeds} seeds, so seed means hold all spread"
    else:
        means = bootstrap_means(rows, draws=draws, seed=seed)
        alpha = expanded_alpha(n, (1 - confidence) / 2)
        lower, upper = np.quantile(means, [alpha, 1 - alpha])
        found = Interval(value=float(np.nanmean(rows)), lower=float(lower), upper=float(upper), n=n)
        method = "bootstrap over facts + t over seed means"
        why = f"the same facts under {n_seeds} seeds; a bootstrap of so few seeds is too narrow"
    return SeedFactInterval(value=found.value, lower=found.lower, upper=found.upper, n=n, method=method, why=why)


@lru_cache(maxsize=256)
def expanded_alpha(n: int, alpha: float) -> float:
    """The tail probability to read off a bootstrap of n items so that its quantile is as far out as Student's t.

    The Bayesian bootstrap's variance is (n - 1) / (n + 1) times the squared standard error, and its tails are normal.
    Source: Hesterberg 2015, "What teachers should know about the bootstrap" (expanded percentiles).
    """
    n = max(n, 2)
    return float(stats.norm.sf(stats.t.isf(alpha, n - 1) * math.sqrt((n + 1) / (n - 1))))


def upper_bound(
    share: float, means: Float[np.ndarray, " draw"], n: int, *, top: float = 1.0, alpha: float = ALPHA
) -> float:
    """One-sided upper bound of a recovered share, with confidence 1 - alpha.

    A bootstrap of n facts without a single recovered one knows nothing of rare recovery. So one fact more is
    resampled with them, unseen and fully recovered (`top`). For hits and misses this is the Clopper-Pearson bound;
    if nothing spreads it is s share + (1 - s) top with s = alpha^(1/n), and never less than that.

    Source: Gaffke 2005; Learned-Miller & Thomas 2019, "A new confidence interval for the mean of a bounded random
    variable"; proven for hits and misses, else checked by simulation.
    """
    return float(upper_bounds(np.array([share]), means[None], n, top=top, alpha=alpha)[0])


def upper_bounds(
    shares: Float[np.ndarray, " attack"],
    means: Float[np.ndarray, "attack draw"],
    n: int,
    *,
    top: float = 1.0,
    alpha: float = ALPHA,
) -> Float[np.ndarray, " attack"]:
    """`upper_bound` of several attacks, each for itself."""
    drawn = means + _unseen_weights(n, means.shape[1]) * np.maximum(top - means, 0.0)
    s = representative_share(n, alpha)
    return np.maximum(np.quantile(drawn, 1 - alpha, axis=1), s * shares + (1 - s) * np.maximum(top, shares))


def lower_bounds(
    shares: Float[np.ndarray, " attack"],
    means: Float[np.ndarray, "attack draw"],
    n: int,
    *,
    bottom: float = 0.0,
    alpha: float = ALPHA,
) -> Float[np.ndarray, " attack"]:
    """One-sided lower bounds of several attacks, each for itself; see `simultaneous_lower_bounds`."""
    lower = np.quantile(_with_unrecovered(means, n, bottom), expanded_alpha(n, alpha), axis=1)
    return np.minimum(lower, bottom + representative_share(n, alpha) * np.maximum(shares - bottom, 0.0))


def _with_unrecovered(means: np.ndarray, n: int, bottom: float) -> np.ndarray:
    return means - _unseen_weights(n, means.shape[1]) * np.maximum(means - bottom, 0.0)


def simultaneous_lower_bounds(
    shares: Sequence[float],
    means: Float[np.ndarray, "attack draw"],
    n: int,
    *,
    bottom: float = 0.0,
    alpha: float = ALPHA,
) -> Float[np.ndarray, " attack"]:
    """Lower bounds that hold for all attacks at once with confidence 1 - alpha (bootstrap max-T).

    Each attack's statistic is put on the scale of its own bootstrap distribution (its rank there), and one common
    level alpha* is chosen so that in a share 1 - alpha of the joint draws every attack stays above its own alpha*
    quantile; alpha / n_attacks <= alpha* <= alpha. As in `upper_bound` an unseen fact is counted, here as not
    recovered at all (`bottom`); for two models that guess that is no limit, hence also `expanded_alpha`.

    Differs from the source: ranks in place of studentised values, so that one attack's bound does not fall when one
    of its facts is recovered better (a standard error would grow).
    Source: Westfall & Young 1993 (max-T, min-P); Beran 1988, balanced simultaneous confidence sets.
    """
    level = alpha
    if len(means) > 1:
        # the highest rank among equals: a draw at an attack's own quantile is not below it
        ranks = stats.rankdata(_with_unrecovered(means, n, bottom), method="max", axis=1) / means.shape[1]
        level = float(np.quantile(ranks.min(axis=0), alpha, method="lower"))
        level = min(max(level, alpha / len(means)), alpha)
    return lower_bounds(np.asarray(shares), means, n, bottom=bottom, alpha=level)


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
