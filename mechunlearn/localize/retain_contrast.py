"""Where these facts are looked up and others are not: the patching profile of one set less that of another."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.holding import Sublayer, held_effects
from mechunlearn.localize.kinds import components_of
from mechunlearn.models import Model


@LOCALIZERS.register("retain_contrast", source="own, on Zhang & Nanda 2023, arXiv:2309.16042 (symmetric patching)")
def retain_contrast(
    model: Model,
    facts: Sequence[Fact],
    *,
    retain: Sequence[Fact] | None = None,
    held: tuple[Sublayer, ...] = (),
    kinds: tuple[Sublayer, ...] = ("mlp", "attention"),
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Measure exactly which sublayers matter more for these facts than for others.

    score(c, role) = e(c, role) / E - mean over retained facts of e'(c, role) / E', with e the drop of the logit
    difference when c writes at the role's tokens what it writes for another subject (see `holding.held_effects`) and
    E the sum over sublayers of |mean over facts of the sum over roles of e|; E' and e' the same on the retained facts.

    What every fact needs, such as the first MLP's account of the tokens, has equal shares in both and cancels. A
    difference of shares, not a ratio: sublayers without effect on either set would have any ratio.

    Shapes: the result is [fact component role].
    Sign and units: share of the whole effect, in about [-1, 1]. Positive: the sublayer supports these facts more than
        the retained ones. Facts that are looked up where the retained ones are score near 0 everywhere: this says where
        two sets differ, and nothing where they do not.

    Args:
        retain: other facts the model knows; without them nothing is subtracted, which sign and notes say.
        held: sublayers that cannot react to the patch, see `held_patching`.

    Raises:
        ValueError: no facts, no kinds, a fact that cannot be paired, or patching without any effect.

    Source: own; the runs as in Zhang & Nanda 2023, arXiv:2309.16042.
    """
    components = components_of(model, "retain_contrast", kinds, ("mlp", "attention"))
    options = {"pairs_per_fact": pairs_per_fact, "batch_size": batch_size, "seed": seed}
    effects, notes = held_effects(model, facts, components, held, **options)
    scores = _shares(effects)
    less = "no retained facts given, so nothing is subtracted; positive: supports these facts"
    if retain:
        less = "less the retained facts' share; positive: supports these facts more"
        scores = scores - _shares(held_effects(model, retain, components, held, **options)[0]).mean(axis=0)
    return ComponentScores(
        method="retain_contrast",
        metric="logit_diff",
        sign=f"share of the drop under patching, {less}",
        components=components,
        per_fact=scores,
        options={"held": list(held), "kinds": list(kinds), **options},
        facts_sha256=hash_facts(facts),
        notes={**notes, "n_retain": len(retain or ()), "retain_sha256": hash_facts(retain or ())},
    )


def _shares(effects: Float[np.ndarray, "fact component role"]) -> Float[np.ndarray, "fact component role"]:
    """The effects as shares of their whole."""
    whole = np.abs(effects.sum(axis=2).mean(axis=0)).sum()
    if not whole > 0:
        raise ValueError("retain_contrast: got no effect of any sublayer; the runs do not differ, take other facts")
    return effects / whole
