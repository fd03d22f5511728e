"""Exact patching without what other sublayers make of it: what a component says itself, at each token."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.holding import Sublayer, held_effects
from mechunlearn.localize.kinds import components_of
from mechunlearn.models import Model


@LOCALIZERS.register(
    "held_patching", source="Pearl 2001 (direct effects); Goldowsky-Dill et al. 2023, arXiv:2304.05969"
)
def held_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    held: tuple[Sublayer, ...] = ("mlp",),
    kinds: tuple[Sublayer, ...] = ("mlp", "attention"),
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Measure exactly what each sublayer contributes that no held sublayer passes on.

    score(c, role) = m(clean run) - m(clean run in which c writes at the role's tokens what it writes on the donor's
    run, and every other sublayer of the held kinds writes at all tokens what it writes on the clean run), with
    m = logit(true answer) - logit(donor's answer).

    The first MLP is on every path: what it says about a token is read by all later MLPs, so that plain patching
    (`held=()`) ranks it high wherever the facts are looked up. With the MLPs held it keeps only what attention moves
    from it to the answer; with attention held, too, only what it writes at the last token itself (the direct effect).

    Shapes: the result is [fact component role].
    Sign and units: logits. Positive: the sublayer's own write supports the true answer. Exact; effects of several
        sublayers or roles do not add up. What a later held MLP makes of a lookup is left out: a lookup that only works
        through later MLPs scores low.

    Args:
        held: what cannot react; () is plain exact patching (noising).
        pairs_per_fact: donors per fact, see `pairs.build_pairs`.

    Raises:
        ValueError: no facts, no kinds, or a fact that cannot be paired.

    Differs from the source: the held set is a kind of sublayer, not the complement of one path; tokens by role.
    Source: Pearl 2001, "Direct and indirect effects"; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    """
    components = components_of(model, "held_patching", kinds, ("mlp", "attention"))
    options = {"pairs_per_fact": pairs_per_fact, "batch_size": batch_size, "seed": seed}
    effects, notes = held_effects(model, facts, components, held, **options)
    return ComponentScores(
        method="held_patching",
        metric="logit_diff",
        sign="drop of the logit difference when the sublayer writes what it does for another subject and what is held "
        "cannot react; positive: its own write supports the true answer",
        components=components,
        per_fact=effects,
        options={"held": list(held), "kinds": list(kinds), **options},
        facts_sha256=hash_facts(facts),
        notes=notes,
    )
