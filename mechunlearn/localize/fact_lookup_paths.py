"""Fact lookup by paths: the MLPs whose output at the subject is what extraction heads carry to the answer."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from scipy.stats import false_discovery_control, ttest_1samp
from torch import Tensor

from mechunlearn.activations import Place, untouched
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.pairs import batches, build_pairs, describe_pairs, fact_means
from mechunlearn.localize.patching import Exchange, Measure, exchange
from mechunlearn.localize.paths import Changed, Receiver, direct_effects, path_effect
from mechunlearn.localize.scoring import RoleGroup, at_roles, measure_of
from mechunlearn.models import Model, all_components


@LOCALIZERS.register(
    "fact_lookup_paths", source="Guo et al. 2024, arXiv:2410.12949; Wang et al. 2022, arXiv:2211.00593"
)
def fact_lookup_paths(
    model: Model,
    facts: Sequence[Fact],
    *,
    form: Literal["denoise", "noise"] = "denoise",
    fdr: Annotated[float, Field(gt=0, le=1)] = 0.05,
    max_heads: Annotated[int, Field(ge=1)] = 10,
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Score each MLP by what it does at the subject's tokens through the heads that extract the fact, and nothing else.

    1. Extraction heads: direct effect on the logits at the last token (see `path_patching`), positive by a one-sided t
    test over facts under Benjamini-Hochberg control over all heads; of those the `max_heads` of the largest mean.
    2. Receivers: their keys and values at the subject's tokens, each in the layer that the test found it in.
    3. score(m) = effect of m's output at the subject's tokens along the paths m -> receivers. An MLP below no receiver
    has no such path and scores exactly 0.

    Shapes: [fact component role] with the single role "subject".
    Sign and units: logits. Positive: the MLP's output on the fact's own run supports the true answer.
    Notes: extraction_heads (direct effect in logits, p and adjusted p of each chosen head), n_significant, receivers,
        receiver_layers.

    Args:
        form: denoise (clean values into the corrupt run) or noise (the reverse).
        fdr: expected share of false extraction heads; 1 takes the best heads, whatever the test says.

    Raises:
        ValueError: fewer than two facts; no significant head; all significant heads in block 0, so no MLP before them.

    Differs from the source: heads are chosen by a test and not by eye, receivers are in their own layers and not at one
        set by hand, and nothing between sender and receiver is recomputed. In grouped-query models keys and values are
        shared, so query heads beside an extraction head receive, too.
    Source: Guo et al. 2024, arXiv:2410.12949 (fact lookup); Wang et al. 2022, arXiv:2211.00593, section 3.1.
    """
    if len(facts) < 2:
        raise ValueError(
            f"fact_lookup_paths: got {len(facts)} facts, allowed: at least 2; its heads are tested over facts"
        )
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, seed=seed)
    heads, mlps = all_components(model, ("head",)), all_components(model, ("mlp",))

    def prepared(kind: Literal["head", "mlp"], role: RoleGroup) -> Iterator[tuple[Exchange, Changed, Measure]]:
        places: list[Place] = [(kind, layer) for layer in range(model.n_layers)]
        for batch in batches(model, pairs, batch_size):
            given = exchange(model, batch, places, restore=form == "denoise")
            yield given, given.cells(at_roles(batch, (role,)))[0], measure_of(batch, "logit_diff")

    with untouched(model), torch.no_grad():
        scored = (
            (given.batch, direct_effects(model, given, heads, changed, measure).T)
            for given, changed, measure in prepared("head", "all")
        )
        chosen, tested = extraction_heads(heads, fact_means(len(facts), scored), fdr=fdr, max_heads=max_heads)
        receivers = receivers_of(model, chosen)
        scored = (
            (given.batch, _along(model, mlps, receivers, given, changed, measure))
            for given, changed, measure in prepared("mlp", "subject")
        )
        effects = fact_means(len(facts), scored)
    return ComponentScores(
        method="fact_lookup_paths",
        metric="logit_diff",
        sign="logits along the paths to the extraction heads' keys and values; positive: the MLP's output at the "
        "subject on the fact's own run supports the true answer",
        components=mlps,
        roles=("subject",),
        per_fact=effects[:, :, None],
        options={
            "form": form,
            "fdr": fdr,
            "max_heads": max_heads,
            "pairs_per_fact": pairs_per_fact,
            "batch_size": batch_size,
            "seed": seed,
        },
        facts_sha256=hash_facts(facts),
        notes={
            **describe_pairs(pairs),
            **tested,
            "receivers": [f"a{r.layer}.{r.part}{r.head}" for r in receivers],
            "receiver_layers": sorted({r.layer for r in receivers}),
        },
    )


def extraction_heads(
    heads: Sequence[Component], direct: Float[np.ndarray, "fact head"], *, fdr: float, max_heads: int
) -> tuple[list[Component], dict[str, Any]]:
    """The heads whose direct effect is positive over facts, largest first, and what a result should tell about them.

    Raises:
        ValueError: no head passes the test.
    """
    means = direct.mean(axis=0)
    spread = direct.std(axis=0) > 0  # without it there is no p value; such heads, mostly at 0, are not chosen
    p = np.ones(len(heads))
    p[spread] = cast(Any, ttest_1samp(direct[:, spread], 0, alternative="greater")).pvalue  # scipy types it too loosely
    adjusted = false_discovery_control(p, method="bh")
    passed = [int(i) for i in np.argsort(-means, kind="stable") if adjusted[i] <= fdr]
    if not passed:
        raise ValueError(
            f"fact_lookup_paths: no head's direct effect is positive at a false discovery rate of {fdr} (lowest "
            f"adjusted p {adjusted.min():.3g}, {len(direct)} facts); give more facts that the model knows, or raise fdr"
        )
    chosen = passed[:max_heads]
    found = {
        str(heads[i]): {"direct_effect": float(means[i]), "p": float(p[i]), "adjusted_p": float(adjusted[i])}
        for i in chosen
    }
    return [heads[i] for i in chosen], {"extraction_heads": found, "n_significant": len(passed)}


def receivers_of(model: Model, heads: Sequence[Component]) -> tuple[Receiver, ...]:
    """Keys and values of the heads, each key-value head once.

    Raises:
        ValueError: all heads are in block 0, which no MLP is before.
    """
    if all(head.layer == 0 for head in heads):
        raise ValueError(
            f"fact_lookup_paths: all extraction heads ({', '.join(map(str, heads))}) are in block 0, and no MLP is "
            "before them; this model extracts no fact by attention, use fact_lookup_probe or activation_patching"
        )
    shared = model.n_heads // model.n_kv_heads
    wanted = sorted({(head.layer, (head.index or 0) // shared) for head in heads})
    return tuple(Receiver(part=part, layer=layer, head=head) for layer, head in wanted for part in ("key", "value"))


def _along(
    model: Model, mlps: Sequence[Component], receivers: Sequence[Receiver], given: Exchange, changed: Changed,
    measure: Measure,
) -> Float[Tensor, "batch mlp"]:  # fmt: skip
    """What each MLP does through the receivers above it."""
    effects = given.run.logits.new_zeros(len(changed), len(mlps))
    for column, sender in enumerate(mlps):
        if above := [receiver for receiver in receivers if receiver.layer > sender.layer]:
            effects[:, column] = path_effect(model, given, [sender], above, changed, measure)
    return effects
