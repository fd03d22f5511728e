"""Recovery curves: how much of the knowledge relearning brings back along its steps, and how soon; no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

Known = Literal["exact", "at least", "at most", "unknown"]


@dataclass(frozen=True, kw_only=True)
class StepsToRecover:
    """Kaplan-Meier medians of the steps until a share q of the knowledge is back; None: not by the last step."""

    q: float
    edited: float | None
    twin: float | None
    edited_censored: int
    twin_censored: int
    """How many curves never got there."""
    n_curves: int
    p_value: float | None
    """Log-rank test, edited against twin; None with fewer than two curves, or nothing to rank."""
    savings: float | None
    """1 - edited / twin: the share of the steps that what is still there saves; negative if it hinders."""
    savings_known: Known
    """What a median beyond the last step leaves of `savings`: a bound, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What one attack's curves show: 0 is a model that never knew, 1 one that knew all along."""

    naurc: float
    """Mean recovered share along log(1 + step), averaged over curves."""
    naurc_curves: tuple[float, ...]
    steps: tuple[StepsToRecover, ...]
    last_step: int


def recovery(
    steps: Sequence[int],
    edited: Float[np.ndarray, "curve step"],
    twin: Float[np.ndarray, "curve step"],
    *,
    original: float,
    null: float,
    quantiles: Sequence[float] = (0.5, 0.8),
) -> Recovery:
    """Compare the relearning of the edited model with that of its twin.

    Args:
        steps: checkpoints, rising from 0.
        edited: P(true | candidates) on hidden facts, in [0, 1]: one curve a seed (mean over facts), or one a fact.
        twin: the same of the equally edited and attacked twin, paired row by row.
        original: A_o, before attacks; the top of the scale.
        null: A_n, the twin before attacks; its bottom.
        quantiles: shares q of the way from `null` to `original` that count as recovered.

    Raises:
        ValueError: steps that do not rise from 0, curves of another shape, numbers out of range.

    Source: `attacks-and-metrics.md` 4.2 no. 4; Kaplan & Meier 1958; Mantel 1966 (log-rank).
    """
    at, u, n = np.asarray(steps, dtype=float), np.atleast_2d(edited), np.atleast_2d(twin)
    if len(at) < 2 or at[0] != 0 or not (np.diff(at) > 0).all():
        raise ValueError(f"recovery: got steps {list(steps)}, allowed: two or more, rising from 0 (before the attack)")
    if u.shape != n.shape or u.shape[1] != len(at) or not len(u):
        raise ValueError(
            f"recovery: got curves {u.shape} and {n.shape} for {len(at)} steps; give pairs, one value each"
        )
    if not (np.isfinite(u).all() and np.isfinite(n).all() and math.isfinite(original - null) and original > null):
        raise ValueError(
            f"recovery: got original {original} and null {null}, allowed: finite curves and original above null"
        )
    if not all(0 < q <= 1 for q in quantiles):
        raise ValueError(f"recovery: got quantiles {list(quantiles)}, allowed: above 0, up to 1")
    shares = (area(at, u) - area(at, n)) / (original - null)
    return Recovery(
        naurc=float(shares.mean()),
        naurc_curves=tuple(shares.tolist()),
        steps=tuple(_compare(at, u, n, q, null + q * (original - null)) for q in quantiles),
        last_step=int(at[-1]),
    )


def area(steps: Float[np.ndarray, " step"], curves: Float[np.ndarray, "curve step"]) -> Float[np.ndarray, " curve"]:
    """Mean height of each curve along log(1 + step) (AURC), in the curve's units; trapezes between checkpoints."""
    log = np.log1p(steps)
    return np.trapezoid(curves, log, axis=1) / log[-1]


def steps_to_recover(
    steps: Float[np.ndarray, " step"], curves: Float[np.ndarray, "curve step"], threshold: float
) -> stats.CensoredData:
    """The first checkpoint of each curve at or above the threshold; right-censored at the last step where none is."""
    there = curves >= threshold
    found = there.any(axis=1)
    first = np.where(found, steps[there.argmax(axis=1)], steps[-1])
    return stats.CensoredData.right_censored(first, ~found)


def _compare(at: np.ndarray, u: np.ndarray, n: np.ndarray, q: float, threshold: float) -> StepsToRecover:
    ours, theirs = steps_to_recover(at, u, threshold), steps_to_recover(at, n, threshold)
    tau_u, tau_n = _median(ours), _median(theirs)
    savings, known = _savings(tau_u, tau_n, float(at[-1]))
    with np.errstate(invalid="ignore"):  # all of them at one step: nothing to rank
        p = float(stats.logrank(ours, theirs).pvalue) if len(u) > 1 else math.nan
    return StepsToRecover(
        q=q, edited=tau_u, twin=tau_n, edited_censored=int(ours.num_censored()),
        twin_censored=int(theirs.num_censored()), n_curves=len(u),
        p_value=None if math.isnan(p) else p,
        savings=savings, savings_known=known,
    )  # fmt: skip


def _median(times: stats.CensoredData) -> float | None:
    survival = stats.ecdf(times).sf
    below = np.flatnonzero(survival.probabilities <= 0.5 + 1e-12)
    return float(survival.quantiles[below[0]]) if len(below) else None


def _savings(edited: float | None, twin: float | None, last: float) -> tuple[float | None, Known]:
    """A twin beyond the last step saves at least what it would there; an edited model beyond it, at most."""
    if twin == 0 or (edited is None and twin is None):
        return None, "unknown"  # the twin had nothing to learn, or neither learnt it
    known: Known = "exact" if None not in (edited, twin) else "at least" if twin is None else "at most"
    if edited == 0:
        known = "exact"  # it was there before the attack: all is saved, however long the twin takes
    return 1 - (last if edited is None else edited) / (last if twin is None else twin), known
