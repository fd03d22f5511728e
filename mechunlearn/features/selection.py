"""Which features carry what is to be forgotten: rules behind one signature, and random ones to hold beside them."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from scipy import stats
from torch import Tensor

from mechunlearn.features.statistics import FeatureStatistics
from mechunlearn.registry import Registry

FEATURE_RULES = Registry("feature rule")
"""Functions of (statistics on text to forget, statistics on text to retain, *, options) -> score of every feature,
minus infinity where the rule refuses it; the highest scores are taken."""

Percent = Annotated[float, Field(ge=0, le=100)]
Rate = Annotated[float, Field(ge=0, le=1)]


class NothingFound(ValueError):
    """No feature (or code) belongs to what is to be forgotten."""


def select_features(
    forget: FeatureStatistics, retain: FeatureStatistics, rule: str, *, n: int, **options: object
) -> tuple[int, ...]:
    """The `n` best features by a rule, best first; fewer where the rule admits fewer.

    Raises:
        ValueError: an unknown rule or option.
        NothingFound: the rule admits none.
    """
    method = FEATURE_RULES.get(rule)
    scores = method.function(forget, retain, **method.validate(options))
    order = torch.argsort(scores, descending=True, stable=True)[:n]
    chosen = tuple(int(i) for i in order if torch.isfinite(scores[i]))
    if not chosen:
        raise NothingFound(f"features: rule '{rule}' with {options or 'its defaults'} admits no feature; loosen it")
    return chosen


@FEATURE_RULES.register("dsg", source="Muhamed et al. 2025, arXiv:2504.08192, section 3")
def dsg(
    forget: FeatureStatistics, retain: FeatureStatistics, *,
    importance: Literal["mean_square", "squared_mean"] = "mean_square", ratio_percentile: Percent = 95.0,
) -> Float[Tensor, " d_sae"]:  # fmt: skip
    """Importance on the text to forget, of features whose ratio of importances is among the highest.

    ratio = importance(forget) / importance(retain); admitted from its `ratio_percentile` on, and with an importance on
    the text to forget above its 5th percentile.

    Args:
        importance: mean_square, E[f^2], is the paper's; squared_mean, (E f)^2, is the released code's.
    """
    wanted, other = getattr(forget, importance), getattr(retain, importance)
    ratio = wanted / (other + 1e-21)
    admitted = (ratio >= _percentile(ratio, ratio_percentile)) & (wanted > 0) & (wanted >= _percentile(wanted, 5.0))
    return wanted.masked_fill(~admitted, -torch.inf)


@FEATURE_RULES.register("retain_sparsity", source="Farrell et al. 2024, arXiv:2410.19278")
def retain_sparsity(
    forget: FeatureStatistics, retain: FeatureStatistics, *, most_retained: Rate = 0.01
) -> Float[Tensor, " d_sae"]:
    """Share of the tokens to forget at which a feature is on, of those that are hardly ever on in text to retain."""
    admitted = (retain.fire_rate < most_retained) & (forget.n_on > 0)
    return forget.fire_rate.masked_fill(~admitted, -torch.inf)


@FEATURE_RULES.register("count_difference", source="CRISP, arXiv:2508.13650")
def count_difference(
    forget: FeatureStatistics, retain: FeatureStatistics, *, least_ratio: Annotated[float, Field(ge=0)] = 3.0
) -> Float[Tensor, " d_sae"]:
    """How much oftener a feature is on, of those whose mean is `least_ratio` times as high.

    Both are taken a token, where the source takes counts of two corpora of one size and adds 1 to the second mean.
    """
    means = (forget.total / forget.n_tokens, retain.total / retain.n_tokens)
    admitted = (means[0] > 0) & (means[0] >= least_ratio * means[1])
    return (forget.fire_rate - retain.fire_rate).masked_fill(~admitted, -torch.inf)


@FEATURE_RULES.register(
    "chi_squared", source="CodeUnlearn, arXiv:2410.10866 (enrichment test); Benjamini & Hochberg 1995"
)
def chi_squared(
    forget: FeatureStatistics, retain: FeatureStatistics, *, false_discovery_rate: Rate = 0.05
) -> Float[Tensor, " d_sae"]:
    """log2 of how much oftener texts to forget have the feature, of those for which that is significant.

    One chi-squared test a feature (with Yates' correction) on the number of texts in which it is on: tokens within a
    text depend on each other. Corrected over all features by Benjamini and Hochberg.
    """
    a, b = forget.n_texts_on.double(), retain.n_texts_on.double()
    p = _chi_squared_p(a.numpy(), forget.n_texts, b.numpy(), retain.n_texts)
    significant = torch.from_numpy(stats.false_discovery_control(p) <= false_discovery_rate)
    ratio = torch.log2(((a + 0.5) / (forget.n_texts + 1)) / ((b + 0.5) / (retain.n_texts + 1)))
    return ratio.masked_fill(~(significant & (ratio > 0)), -torch.inf)


def _chi_squared_p(a: np.ndarray, n_a: int, b: np.ndarray, n_b: int) -> np.ndarray:
    """Of 2 x 2 tables [[a, n_a - a], [b, n_b - b]], with Yates' correction; 1 where a row or column is empty."""
    n, on = n_a + n_b, a + b
    off = n - on
    difference = np.maximum(np.abs(a * (n_b - b) - b * (n_a - a)) - n / 2, 0.0)
    bottom = on * off * n_a * n_b
    statistic = np.divide(n * difference**2, bottom, out=np.zeros_like(a), where=bottom > 0)
    return stats.chi2.sf(statistic, df=1)


def matched_at_random(
    chosen: Sequence[int], rate: Float[np.ndarray, " feature"], *, seed: int, nearest: int = 20
) -> tuple[int, ...]:
    """As many others, each drawn among the `nearest` in how often they are on.

    A control: what is done to features (or codes) that are on as often and have nothing to do with what is forgotten.

    Raises:
        ValueError: fewer others than chosen ones.
    """
    if 2 * len(chosen) > len(rate):
        raise ValueError(f"features: got {len(chosen)} of {len(rate)} features, too many to draw others beside")
    rng = np.random.default_rng(seed)
    free = np.setdiff1d(np.arange(len(rate)), np.asarray(chosen))
    drawn: list[int] = []
    for feature in chosen:
        close = free[np.argsort(np.abs(rate[free] - rate[feature]), kind="stable")[:nearest]]
        drawn.append(int(rng.choice(close)))
        free = free[free != drawn[-1]]
    return tuple(drawn)


def _percentile(values: Float[Tensor, " d_sae"], percent: float) -> float:
    return float(np.percentile(values.numpy(), percent))
