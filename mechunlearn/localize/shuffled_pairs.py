"""Control: what a pair-based localizer finds where there is nothing to find."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.models import Model


@LOCALIZERS.register("shuffled_pairs", source="control: both runs have the same answer, a null for pair-based scores")
def shuffled_pairs(
    model: Model,
    facts: Sequence[Fact],
    *,
    method: str = "attribution_patching",
    options: Mapping[str, bool | int | float | str | Sequence[str]] | None = None,
    draws: Annotated[int, Field(ge=1)] = 5,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Run a pair-based localizer with corrupt = another subject with the *same* answer, for a null distribution.

    Subjects, and hence all activations, differ as in the real pairs, the answer does not: what the scores then are is
    what they owe to the exchange of subjects alone. score = mean over `draws` drawings of donors. Facts whose answer no
    other subject of theirs has are left out, so there may be fewer rows than facts.

    Sign and units: those of `method`. Expected 0 for exact effects and for the form "both" of first-order scores, which
        change their sign when the two runs are exchanged. The forms "denoise" and "noise" are shifted by minus and plus
        half the metric's curvature along the exchange, which real pairs share.

    Args:
        method: any localizer with an option `donors`.
        options: of that method; its own `donors` and `seed` are set here.
        draws: drawings of donors and counterfactuals, with the seeds from `seed` on.

    Returns:
        Scores whose notes hold `draws` (the value of each component in each draw), `standard_deviation` over them, and
        `n_left_out`.

    Raises:
        ValueError: a method without pairs, or no two subjects that share an answer.
    """
    chosen, given = LOCALIZERS.get(method), dict(options or {})
    if "donors" not in chosen.options.model_fields:
        able = [m.name for m in LOCALIZERS.methods() if "donors" in m.options.model_fields]
        raise ValueError(f"shuffled_pairs: option 'method': got {method!r}, allowed: {', '.join(able)}")
    if fixed := {"donors", "seed"} & set(given):
        raise ValueError(
            f"shuffled_pairs: option 'options': got {sorted(fixed)[0]!r}, which it sets itself; leave it out"
        )
    holders: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        holders.setdefault((fact.relation, fact.target_true), set()).add(fact.subject)
    used = [fact for fact in facts if len(holders[fact.relation, fact.target_true]) > 1]
    if not used:
        raise ValueError(
            f"shuffled_pairs: got {len(facts)} facts, no two of them with the same answer; give more facts"
        )
    checked = chosen.validate(given | {"donors": "same_answer"})
    found: list[ComponentScores] = [
        chosen.function(model, used, **checked | {"seed": seed + draw}) for draw in range(draws)
    ]
    values = np.stack([scores.values for scores in found])
    first = found[0]
    return replace(
        first,
        method="shuffled_pairs",
        sign=f"null of {method}: {first.sign}",
        per_fact=np.mean([scores.per_fact for scores in found], axis=0),
        options={"method": method, "options": dict(first.options), "draws": draws, "seed": seed},
        notes={
            "draws": values.tolist(),
            "standard_deviation": values.std(axis=0, ddof=1).tolist() if draws > 1 else None,
            "n_left_out": len(facts) - len(used),
            "first_draw": dict(first.notes),
        },
    )
