"""How often each interval of `statistics` holds the truth, by simulation with a known truth.

Width is the mean width of a two-sided interval and the mean distance from estimate to bound of a one-sided one. Rows
whose interval starts with "not used" show what the interval in use is there to avoid.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechunlearn.statistics import (
    bootstrap_means,
    bootstrap_weights,
    exact_interval,
    hierarchical_interval,
    lower_bounds,
    mean_interval,
    seed_interval,
    simultaneous_lower_bounds,
    t_deviations,
    upper_bounds,
)

N_FACTS = (32, 64, 128, 256)
RESAMPLES = 1000
Sample = Callable[[np.random.Generator, tuple[int, ...]], Float[np.ndarray, "..."]]
Row = tuple[str, str, int, np.ndarray, np.ndarray]
"""interval, data, n facts, whether each draw's interval holds the truth, its width."""


def _guessing(k: int, share: float) -> Sample:
    """Two models that guess all or nothing among k answers; a share of the facts is recovered fully."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        known = rng.random(shape) < share
        return ((known | (rng.random(shape) < 1 / k)) * 1.0 - (rng.random(shape) < 1 / k)) / (1 - 1 / k)

    return draw


def _unsure(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """P(true) of two models that are unsure, both in [0, 1]; the edited one is a little better throughout."""
    return rng.beta(0.6, 2.4, shape) - rng.beta(0.4, 3.6, shape)


SHARES: dict[str, tuple[Sample, float]] = {
    "rare recovery 3%": (lambda rng, shape: (rng.random(shape) < 0.03) * 1.0, 0.03),
    "rare recovery 10%": (lambda rng, shape: (rng.random(shape) < 0.1) * 1.0, 0.1),
    "heavy skew": (lambda rng, shape: rng.beta(0.1, 0.9, shape), 0.1),
    "bounded scores": (_unsure, 0.1),
    "guessing among 5, 10% recovered": (_guessing(5, 0.1), 0.1),
    "guessing among 20, 10% recovered": (_guessing(20, 0.1), 0.1),
    "mostly recovered 90%": (lambda rng, shape: (rng.random(shape) < 0.9) * 1.0, 0.9),
}
"""Per-fact recovered shares with their true mean, most of them at the limit of 0.1 where verdicts can go wrong."""


def coverage(*, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Simulate every interval under every data model it may meet, at 32 to 256 facts; two minutes for 2,000 draws.

    Returns:
        One row an interval, data model and number of facts: interval, data, n_facts, draws, nominal, coverage, lower,
        upper (exact 95% interval of the coverage), width, holds (coverage >= 94%).
    """
    rng = np.random.default_rng(seed)
    parts = (bounds, four_at_once, two_sided, proxy_null, few_seeds)
    return table([row for n in N_FACTS for part in parts for row in part(rng, draws, n)])


def table(rows: list[Row]) -> pd.DataFrame:
    """Arrange simulated rows as the table of `coverage`."""
    lines = []
    for interval, data, n, held, width in rows:
        found = exact_interval(int(held.sum()), len(held))
        line = (interval, data, n, found.n, 0.95, found.value, found.lower, found.upper, float(width.mean()))
        lines.append((*line, found.value >= 0.94))
    columns = "interval data n_facts draws nominal coverage lower upper width holds".split()
    return pd.DataFrame(lines, columns=pd.Index(columns))


def bounds(rng: np.random.Generator, draws: int, n: int) -> Iterator[Row]:
    """The one-sided bounds that decide verdicts, of one attack."""
    weights = bootstrap_weights(n, RESAMPLES, 0).T / n
    for data, (sample, truth) in SHARES.items():
        values = sample(rng, (draws, n))
        shares, means = values.mean(axis=1), values @ weights
        upper, lower = upper_bounds(shares, means, n), lower_bounds(shares, means, n)
        yield "upper_bound", data, n, upper >= truth, upper - shares
        yield "lower bound, one attack", data, n, lower <= truth, shares - lower


def four_at_once(rng: np.random.Generator, draws: int, n: int) -> Iterator[Row]:
    """The lower bounds of four attacks, which must all hold; width is that of the first."""
    resamples = 4 * RESAMPLES if n < 64 else RESAMPLES  # as many as `decide` draws; fewer blur the level at few facts
    weights = bootstrap_weights(n, resamples, 0).T / n
    for data in ("rare recovery 10%", "guessing among 5, 10% recovered"):
        sample, truth = SHARES[data]
        values = sample(rng, (draws, 4, n))
        shares, means = values.mean(axis=2), values @ weights
        lower = np.stack([simultaneous_lower_bounds(shares[i].tolist(), means[i], n) for i in range(draws)])
        held = np.all(lower <= truth, axis=1, keepdims=True)[:, 0]
        yield "lower bounds, 4 attacks at once", data, n, held, (shares - lower)[:, 0]


def two_sided(rng: np.random.Generator, draws: int, n: int) -> Iterator[Row]:
    """Intervals over facts: means of scores, proportions, differences of arms, scores without limits."""
    for rate in (0.03, 0.5):
        counts, drawn = np.unique(rng.binomial(n, rate, draws), return_inverse=True)
        held, width = _held([exact_interval(int(k), n) for k in counts], rate)
        yield "exact_interval", f"proportion {rate}", n, held[drawn], width[drawn]
    for data in ("rare recovery 10%", "heavy skew", "bounded scores"):
        sample, truth = SHARES[data]
        found = [mean_interval(values, draws=RESAMPLES) for values in sample(rng, (draws, n))]
        yield "mean_interval", data, n, *_held(found, truth)
    found = [mean_interval(values) for values in rng.gamma(4.0, 1.0, (draws, n))]
    yield "mean_interval", "no limits, skew 1", n, *_held(found, 4.0)


def proxy_null(rng: np.random.Generator, draws: int, n: int) -> Iterator[Row]:
    """The upper bound against fabricated facts, another sample, in place of a twin."""
    for n_null in (16, n):
        edited, null = rng.beta(0.6, 2.4, (draws, n)), rng.beta(0.4, 3.6, (draws, n_null))
        shares = edited.mean(axis=1) - null.mean(axis=1)
        means = edited @ bootstrap_weights(n, RESAMPLES, 0).T / n - null.mean(axis=1)[:, None]
        noise = np.stack([t_deviations(values, draws=RESAMPLES, seed=2) for values in null])
        upper = upper_bounds(shares, means - noise, n)
        yield "upper_bound, proxy null", f"{n_null} fabricated facts", n, upper >= 0.1, upper - shares
        noise = null @ bootstrap_weights(n_null, RESAMPLES, 2).T / n_null - null.mean(axis=1)[:, None]
        upper = upper_bounds(shares, means - noise, n)
        name = "upper_bound, proxy null resampled"
        yield name, f"{n_null} fabricated facts", n, upper >= 0.1, upper - shares


def few_seeds(rng: np.random.Generator, draws: int, n: int) -> Iterator[Row]:
    """Five seeds (n facts in all): the same facts under each, or other facts under each."""
    for data, seed_sd, fact_sd in (("seeds differ", 0.1, 0.1), ("facts differ", 0.02, 0.5), ("both differ", 0.1, 0.5)):
        noise = rng.normal(size=(draws, 5, n)) * 0.1
        values = 0.1 + noise + rng.normal(size=(draws, 5, 1)) * seed_sd + rng.normal(size=(draws, 1, n)) * fact_sd
        same = f"5 seeds, same facts, {data}"
        found = [hierarchical_interval(rows, draws=RESAMPLES) for rows in values]
        yield "hierarchical_interval", same, n, *_held(found, 0.1)
        found = [seed_interval(rows.mean(axis=1)) for rows in values]
        yield "not used: t over seed means alone", same, n, *_held(found, 0.1)
        yield "not used: bootstrap of seeds and facts", same, n, *_resampled(values, 0.1)
        means = np.stack([bootstrap_means(rows, draws=RESAMPLES) for rows in values])
        shares = values.mean(axis=(1, 2))
        upper, lower = upper_bounds(shares, means, n), lower_bounds(shares, means, n)
        yield "upper_bound", same, n, upper >= 0.1, upper - shares
        yield "lower bound, one attack", same, n, lower <= 0.1, shares - lower
    for data in ("rare recovery 10%", "bounded scores"):
        nested = SHARES[data][0](rng, (draws, n))
        owner = np.arange(n) % 5
        tables = np.where(owner == np.arange(5)[:, None], nested[:, None], np.nan)
        found = [hierarchical_interval(rows) for rows in tables]
        yield "hierarchical_interval", f"5 seeds, other facts, {data}", n, *_held(found, 0.1)
        means, shares = np.stack([bootstrap_means(rows, draws=RESAMPLES) for rows in tables]), nested.mean(axis=1)
        upper = upper_bounds(shares, means, n)
        yield "upper_bound", f"5 seeds, other facts, {data}", n, upper >= 0.1, upper - shares
    for n_seeds in (3, 5):
        found = [seed_interval(rows) for rows in rng.normal(size=(draws, n_seeds))]
        yield "seed_interval", f"{n_seeds} normal seed means", n, *_held(found, 0.0)


def _held(found: list, truth: float) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = np.array([(interval.lower, interval.upper) for interval in found]).T
    return (lower <= truth) & (truth <= upper), upper - lower


def _resampled(values: Float[np.ndarray, "draw seed fact"], truth: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the mean with seeds and facts drawn again, as is often done."""
    rng = np.random.default_rng(0)
    n_seeds, n = values.shape[1:]
    by_seed = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), RESAMPLES) / n_seeds
    by_fact = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    drawn = np.stack([((by_seed @ rows) * by_fact).sum(axis=1) for rows in values])
    lower, upper = np.quantile(drawn, [0.025, 0.975], axis=1)
    return (lower <= truth) & (truth <= upper), upper - lower
