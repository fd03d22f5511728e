"""How many hidden facts a verdict needs, by simulating the bounds that decide it; numpy and scipy only.

The model of a score: a share `effect` of the facts is recovered fully, and on every other fact edited model and twin
guess among the candidates, each for itself. Guesses are all or nothing unless `sd` says that they spread less. Attacks
are independent, the hardest case for both verdicts, so one attack is simulated: `removed` needs every attack's bound
(the power of one to the number of attacks), and the max-T level of independent attacks is Sidak's.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from mechunlearn.statistics import (
    ALPHA,
    MOST_FACTS,
    bootstrap_weights,
    chance_sd,
    facts_needed,
    lower_bounds,
    upper_bounds,
)

DRAWS, TRIALS, MOST_SIMULATED = 400, 600, 2000
Aim = Literal["removed", "hidden"]


def power(
    *,
    n_facts: int,
    effect: float,
    n_candidates: int,
    delta: float = 0.1,
    n_attacks: int = 1,
    sd: float | None = None,
    trials: int = TRIALS,
    seed: int = 0,
) -> float:
    """Probability that `decide` reaches the true verdict: `removed` if the effect is below delta, else `hidden`.

    `removed`: every attack recovers `effect`, and all upper bounds must lie below delta. `hidden`: one attack
    recovers it, the others nothing, and its lower bound, simultaneous over attacks, must lie above delta. One seed.

    Args:
        n_facts: hidden facts.
        effect: true recovered share D, in [0, 1].
        n_candidates: answers that P(true | candidates) is taken over.
        delta: largest share that still counts as removed.
        n_attacks: deciding attacks.
        sd: spread over facts of the recovered share of a model that knows nothing, as measured (twin against twin);
            None: `chance_sd`, the most that guessing can spread.
        trials: simulated verdicts; the result's standard error is at most 0.5 / sqrt(trials).
        seed: of the simulation.

    Raises:
        ValueError: a number out of range, or an effect that equals delta (no verdict is true there).
    """
    aim = _check(n_facts, effect, n_candidates, delta, n_attacks, sd)
    scores = _scores(np.random.default_rng(seed), effect, (trials, n_facts), n_candidates, sd)
    drawn = scores @ bootstrap_weights(n_facts, DRAWS, seed).T / n_facts
    means = scores.mean(axis=1)
    if aim == "removed":
        return float(np.mean(upper_bounds(means, drawn, n_facts) < delta)) ** n_attacks
    return float(np.mean(lower_bounds(means, drawn, n_facts, alpha=_level(n_attacks)) > delta))


def _level(n_attacks: int) -> float:
    """The common level of max-T over independent attacks (Sidak 1967)."""
    return 1 - (1 - ALPHA) ** (1 / n_attacks)


def facts_for_power(
    *,
    effect: float,
    n_candidates: int,
    delta: float = 0.1,
    n_attacks: int = 1,
    sd: float | None = None,
    goal: float = 0.8,
    seed: int = 0,
) -> int | None:
    """How many hidden facts give `power` >= goal (to within the simulation: some 5%); None above ten million.

    A first guess from the normal distribution, corrected by simulation: sqrt(n) (delta - effect) / spread is linear
    in the normal quantile of the power. Above 2,000 facts the first guess stands.

    Raises:
        ValueError: as `power`, or a goal outside (0, 1).
    """
    aim = _check(1, effect, n_candidates, delta, n_attacks, sd)
    if not 0 < goal < 1:
        raise ValueError(f"power: got goal {goal}, allowed: between 0 and 1")
    spread = math.hypot((chance_sd(n_candidates) if sd is None else sd), math.sqrt(effect * (1 - effect)))
    removed = aim == "removed"
    alpha, each = (ALPHA, goal ** (1 / n_attacks)) if removed else (_level(n_attacks), goal)
    n = facts_needed(sd=spread, margin=abs(delta - effect), share=effect if removed else 1.0, alpha=alpha, power=each)
    if n is None or n > MOST_SIMULATED:
        return n
    z_alpha, z_goal = stats.norm.isf(alpha), stats.norm.ppf(each)
    low, high = 1, MOST_FACTS  # n known to be too few, to be enough
    for _ in range(8):
        n = min(max(n, low + 1), high - 1, MOST_SIMULATED)
        reached = power(
            n_facts=n, effect=effect, n_candidates=n_candidates, delta=delta, n_attacks=n_attacks, sd=sd, seed=seed
        )
        if reached >= goal:
            high = n
        else:
            low = n
        if high < MOST_FACTS and low > 1:
            n = round(math.sqrt(low * high))
        else:
            z = stats.norm.ppf(np.clip(reached, 0.02, 0.98) ** (1 / n_attacks if removed else 1))
            n = round(n * float(np.clip((z_alpha + z_goal) / max(z_alpha + z, 0.1), 0.5, 1.6)) ** 2 * 1.03)
        if high <= low * 1.05 + 1 or low >= MOST_SIMULATED:
            break
    return high if high < MOST_FACTS else max(n, low + 1)


def power_table(
    *,
    n_facts: int,
    n_candidates: int,
    delta: float = 0.1,
    n_attacks: int = 1,
    effects: Sequence[float] = (0.0, 0.02, 0.25, 1.0),
    sd: float | None = None,
    goal: float = 0.8,
    seed: int = 0,
) -> pd.DataFrame:
    """What `plan` prints: for each true recovered share, the power at n_facts and how many facts power >= goal needs.

    Returns:
        One row an effect: effect, verdict, candidates, delta, attacks, sd, facts, power, facts needed (missing: no
        number suffices, ten million at most).

    Raises:
        ValueError: as `power`.
    """
    rows = []
    for effect in effects:
        aim = _check(n_facts, effect, n_candidates, delta, n_attacks, sd)
        reached = power(
            n_facts=n_facts, effect=effect, n_candidates=n_candidates, delta=delta, n_attacks=n_attacks, sd=sd,
            seed=seed,
        )  # fmt: skip
        needed = facts_for_power(
            effect=effect, n_candidates=n_candidates, delta=delta, n_attacks=n_attacks, sd=sd, goal=goal, seed=seed
        )
        spread = chance_sd(n_candidates) if sd is None else sd
        rows.append((effect, aim, n_candidates, delta, n_attacks, spread, n_facts, reached, needed))
    columns = ["effect", "verdict", "candidates", "delta", "attacks", "sd", "facts", "power", "facts needed"]
    return pd.DataFrame(rows, columns=pd.Index(columns)).astype({"facts needed": "Int64"})


def _check(n_facts: int, effect: float, n_candidates: int, delta: float, n_attacks: int, sd: float | None) -> Aim:
    if n_facts < 1 or n_attacks < 1 or n_candidates < 2:
        raise ValueError(
            f"power: got {n_facts} facts, {n_attacks} attacks, {n_candidates} candidates, allowed: 1, 1, 2 or more"
        )
    if not (0 <= effect <= 1 and 0 < delta < 1) or (sd is not None and not sd >= 0):
        raise ValueError(f"power: got effect {effect}, delta {delta}, sd {sd}; allowed: effect and delta in [0, 1]")
    if effect == delta:
        raise ValueError(f"power: got effect {effect} = delta, where no verdict is true; choose another of them")
    return "removed" if effect < delta else "hidden"


def _scores(
    rng: np.random.Generator, effect: float, shape: tuple[int, int], k: int, sd: float | None
) -> Float[np.ndarray, "trial fact"]:
    """Recovered shares of single facts, edited minus twin over 1 - 1/k; their mean is `effect`."""
    spread = 1.0 if sd is None else sd / chance_sd(k)
    # P(true) = 1/k + spread (guess - 1/k) has the mean of a guess and `spread` times its standard deviation
    edited, twin = (1 / k + spread * ((rng.random(shape) < 1 / k) - 1 / k) for _ in range(2))
    edited = np.where(rng.random(shape) < effect, 1.0, edited)
    return (edited - twin) / (1 - 1 / k)
