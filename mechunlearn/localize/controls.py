"""What the control localizations share: scores that do not depend on the facts."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact, hash_facts


def constant_scores(
    method: str,
    facts: Sequence[Fact],
    components: tuple[Component, ...],
    values: Float[np.ndarray, " component"],
    options: Mapping[str, int],
) -> ComponentScores:
    """The same values for every fact.

    Raises:
        ValueError: no facts.
    """
    if not facts:
        raise ValueError(f"{method}: got no facts, allowed: at least one")
    return ComponentScores(
        method=method,
        metric="none",
        sign="no meaning beyond the order; positive so that every component may be chosen",
        components=components,
        roles=("all",),
        per_fact=np.broadcast_to(values[None, :, None], (len(facts), len(components), 1)),
        options=dict(options),
        facts_sha256=hash_facts(facts),
    )


def random_values(n: int, seed: int) -> Float[np.ndarray, " component"]:
    """Return n numbers, uniform in (0, 1], from a generator of their own."""
    return 1.0 - np.random.default_rng(seed).random(n)
