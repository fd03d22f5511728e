"""Activation patching: what each component's values at each role of token do to the facts, measured exactly."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Place, exact, hooked, last_logits, place_of, untouched
from mechunlearn.components import ROLES, ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.kinds import each_once
from mechunlearn.localize.pairs import Donors, Pair, align, batches, build_pairs, describe_pairs
from mechunlearn.localize.patching import Exchange, exchange
from mechunlearn.localize.scoring import RoleGroup, clean_roles, exact_scores, whole
from mechunlearn.models import Model, all_components

Form = Literal["denoise", "noise", "zero", "mean", "resample"]


@LOCALIZERS.register(
    "activation_patching", source="Meng et al. 2022, arXiv:2202.05262; Zhang & Nanda 2023, arXiv:2309.16042"
)
def activation_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    form: Form = "denoise",
    metric: Literal["logit_diff", "accuracy"] = "logit_diff",
    kinds: tuple[Literal["mlp", "attention", "head"], ...] = ("mlp", "attention"),
    roles: tuple[RoleGroup, ...] = ROLES,
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    donors: Donors = "other_answer",
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Put other values in a component's place at a role's tokens, run the rest of the model, and see what changes.

    denoise: score = m(corrupt run with the component's clean values) - m(corrupt run). All others: score =
    m(clean run) - m(clean run with other values): noise takes them from the corrupt run, zero puts 0, mean takes the
    mean over all facts' clean runs at tokens of the same role, resample another fact's clean run, whatever its relation
    or answer.

    Shapes: [fact component role], a mean over the fact's pairs.
    Sign and units: logits, or a share in [-1, 1] for accuracy. Positive: the component's own value supports the true
        answer. Exact, but effects of several components or roles do not add up.

    Args:
        metric: "logit_diff": true answer against the donor's; "accuracy": 1 where the true answer beats all other
            candidates at the first token where the two answers differ.
        kinds: "head" changes one head's z before the output projection.
        roles: a column each; "subject" and "all" change all tokens of the subject, or of the prompt, at once.
        pairs_per_fact: donors per fact (see `pairs.build_pairs`); for resample, other facts drawn.
        donors: "same_answer" gives the scores' null distribution, see `shuffled_pairs`; for denoise and noise.
        batch_size: pairs recorded at once, and half the changed runs at once.

    Raises:
        ValueError: no facts, no or repeated kinds or roles, a fact that cannot be paired, or donors with the same
            answer for a form without donors.

    Differs from the source: tokens are aligned by role, so prompts may differ in length; a single fact is resampled
        from its own prompt with random tokens as subject.
    Source: Meng et al. 2022, arXiv:2202.05262, section 2; Zhang & Nanda 2023, arXiv:2309.16042 (symmetric replacement,
        denoising and noising); Chan et al. 2022, "Causal Scrubbing" (resampling).
    """
    each_once("activation_patching", kinds=kinds, roles=roles)
    if donors == "same_answer" and form not in ("denoise", "noise"):
        raise ValueError(
            f"activation_patching: option 'donors': got {donors!r} with form {form!r}, allowed: denoise and noise; the "
            "other forms take no donor's values"
        )
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, donors=donors, seed=seed)
    described = describe_pairs(pairs)
    if form == "resample":
        pairs = resampled(pairs, facts, seed)
    elif form in ("zero", "mean"):
        pairs = tuple(map(whole, pairs))
    components = all_components(model, kinds)
    places = sorted({place_of(component) for component in components})

    def prepared() -> Iterator[Exchange]:
        means = _role_means(model, pairs, places, batch_size) if form == "mean" else {}
        for batch in batches(model, pairs, batch_size):
            given = exchange(model, batch, places, restore=form == "denoise")
            if form in ("zero", "mean"):
                fill = {place: torch.zeros_like(value) for place, value in given.values.items()}
                for place, mean in means.items():
                    fill[place][:, : batch.roles.shape[1]] = (batch.roles.to(mean.dtype) @ mean).to(fill[place].dtype)
                given = replace(given, values=fill, logits={"clean": given.logits["clean"]})
            yield given

    with untouched(model), torch.no_grad():
        per_fact, means = exact_scores(
            model, len(facts), prepared(), components, roles, metric=metric, batch_size=2 * batch_size
        )
    return ComponentScores(
        method="activation_patching",
        metric=metric,
        sign=f"{'logits' if metric == 'logit_diff' else 'share of pairs'}; positive: the component's value on the "
        "fact's own run supports the true answer",
        components=components,
        roles=roles,
        per_fact=per_fact,
        options={
            "form": form,
            "metric": metric,
            "kinds": list(kinds),
            "roles": list(roles),
            "pairs_per_fact": pairs_per_fact,
            "donors": donors,
            "batch_size": batch_size,
            "seed": seed,
        },
        facts_sha256=hash_facts(facts),
        notes={**described, **means},
    )


def resampled(pairs: Sequence[Pair], facts: Sequence[Fact], seed: int) -> tuple[Pair, ...]:
    """Every pair with another fact's clean prompt as its corrupt run; which does not depend on the facts' order."""
    prompts = {facts[pair.fact].key: pair for pair in pairs}
    given: dict[int, random.Random] = {}
    changed: list[Pair] = []
    for pair in pairs:
        fact = facts[pair.fact]
        others = [key for key in sorted(prompts) if key[0] != fact.subject]
        rng = given.setdefault(pair.fact, random.Random(f"resample {seed} {fact.key}"))
        if not others:
            changed.append(pair)
            continue
        other = prompts[rng.choice(others)]
        roles = clean_roles(pair)
        aligned = tuple((c, k, ROLES.index(roles[c])) for c, k in align(roles, clean_roles(other)))
        changed.append(replace(pair, corrupt=other.clean, aligned=aligned))
    return tuple(changed)


def _role_means(
    model: Model, pairs: Sequence[Pair], places: Sequence[Place], batch_size: int
) -> dict[Place, Float[Tensor, "role width"]]:
    """Mean of each place over all tokens of a role in all facts' clean prompts."""
    clean = {pair.fact: pair for pair in pairs}.values()
    sums: dict[Place, Tensor] = {}
    count = torch.zeros(len(ROLES), device=model.device)
    for batch in batches(model, list(clean), batch_size):
        with hooked(model, record=places) as seen:
            last_logits(model, batch.clean)
        count += batch.roles.sum(dim=(0, 1))
        for place, value in seen.items():
            taken = exact(batch.take(value, batch.clean_positions))
            found = torch.einsum("bar,baw->rw", batch.roles.to(taken.dtype), taken)
            sums[place] = sums[place] + found if place in sums else found
    return {place: total / count.clamp(min=1)[:, None].to(total.dtype) for place, total in sums.items()}
