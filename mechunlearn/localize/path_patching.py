"""Path patching: how much of a component's effect goes straight to the answer, and how much through later ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Place, place_of, untouched
from mechunlearn.components import ROLES, Component, ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.kinds import each_once
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs, describe_pairs, fact_means
from mechunlearn.localize.patching import component_effects, exchange
from mechunlearn.localize.paths import FINAL, Receiver, direct_effects, path_effect, total_effect
from mechunlearn.localize.scoring import Metric, RoleGroup, at_roles, measure_of
from mechunlearn.models import Model, all_components


@dataclass(frozen=True, kw_only=True, eq=False)
class PathEffects:
    """Effects of the senders on each pair's metric; total = direct + indirect."""

    total: Float[Tensor, " batch"]
    """All paths: the senders' values are put in, everything after them is run."""
    direct: Float[Tensor, " batch"]
    """The paths from the senders to the receivers without a component between them, and from there on freely."""
    indirect: Float[Tensor, " batch"]
    """The rest: total - direct."""


def path_effects(
    model: Model,
    batch: PairBatch,
    senders: Sequence[Component],
    receivers: Sequence[Receiver] = (FINAL,),
    *,
    roles: Sequence[RoleGroup] = ("all",),
    form: Literal["denoise", "noise"] = "denoise",
    metric: Metric = "logit_diff",
) -> PathEffects:
    """Put the senders' values of the other run in, and let them be seen by the receivers alone, or by all.

    Shapes: [batch], one number a pair.
    Sign and units: the metric's; positive: the senders' values on the fact's own run support the true answer.

    Args:
        receivers: inputs that take the senders' values in; those before a sender get nothing from it.
        roles: tokens at which the senders' values, and so the receivers' inputs, are changed.
        form: "denoise" puts clean values into the corrupt run, "noise" corrupt values into the clean run.

    Raises:
        ValueError: no senders or receivers, receivers that the model does not have, or an attention sublayer with a
            head of its own.

    Differs from the source: MLPs between sender and receiver are frozen as heads are; Wang et al. recompute them.
    Source: Wang et al. 2022, arXiv:2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    """
    if not senders or not receivers:
        raise ValueError(
            f"path patching: got {len(senders)} senders, {len(receivers)} receivers, allowed: one or more each"
        )
    for receiver in receivers:
        heads = {"query": model.n_heads, "key": model.n_kv_heads, "value": model.n_kv_heads}.get(receiver.part)
        in_layer = receiver == FINAL or 0 <= receiver.layer < model.n_layers
        if not in_layer or (heads is not None and not 0 <= receiver.head < heads):
            raise ValueError(
                f"path patching: got receiver {receiver}, allowed: layers 0 to {model.n_layers - 1}, {model.n_heads} "
                f"query and {model.n_kv_heads} key and value heads"
            )
    frozen: list[Place] = [("attention", receiver.layer) for receiver in receivers if receiver.part == "mlp"]
    with untouched(model), torch.no_grad():
        places = [*map(place_of, senders), *frozen]
        given = exchange(model, batch, places, restore=form == "denoise")
        changed, measure = given.cells(at_roles(batch, roles)).any(dim=0), measure_of(batch, metric)
        total = total_effect(model, given, senders, changed, measure)
        direct = path_effect(model, given, senders, receivers, changed, measure)
    return PathEffects(total=total, direct=direct, indirect=total - direct)


@LOCALIZERS.register(
    "path_patching", source="Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969"
)
def path_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    effect: Literal["direct", "indirect", "total"] = "direct",
    form: Literal["denoise", "noise"] = "denoise",
    metric: Literal["logit_diff", "accuracy"] = "logit_diff",
    kinds: tuple[Literal["mlp", "attention", "head"], ...] = ("mlp", "head"),
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Score components by what they write straight into the answer, or by what they do through later components.

    direct: m(base run with the other run's write of c in the final residual stream in place of its own) - m(base), all
    other components frozen, final norm and unembedding run. total: `activation_patching`'s score. indirect: total -
    direct. The direct effect is 0 but at the prompt's last token; the others are by role.

    Shapes: [fact component role].
    Sign and units: logits, or a share for accuracy. Positive: the component's value on the fact's own run supports the
        true answer.

    Args:
        form: denoise (base: corrupt run) or noise (base: clean run).
        kinds: "head" is one head's z before the output projection.

    Raises:
        ValueError: no or repeated kinds, no facts, or a fact that cannot be paired.

    Differs from the source: MLPs are frozen with the heads; tokens are aligned by role.
    Source: Wang et al. 2022, arXiv:2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    """
    each_once("path_patching", kinds=kinds)
    pairs = build_pairs(model, facts, pairs_per_fact=pairs_per_fact, seed=seed)
    components = all_components(model, kinds)
    places = sorted({place_of(component) for component in components})

    def scored() -> Iterator[tuple[PairBatch, Tensor]]:
        for batch in batches(model, pairs, batch_size):
            given, measure = exchange(model, batch, places, restore=form == "denoise"), measure_of(batch, metric)
            selected = at_roles(batch, ROLES)
            scores = torch.zeros(len(batch.pairs), len(components), len(ROLES), device=model.device)
            if effect != "direct":
                scores = component_effects(
                    model, given, components, selected, measure, batch_size=2 * batch_size
                )  # fmt: skip
            if effect != "total":
                changed = given.cells(selected)
                straight = direct_effects(model, given, components, changed.any(dim=0), measure).T
                rows = torch.arange(len(batch.pairs), device=model.device)
                ends = changed[:, rows, given.run.tokens.last].T  # [batch role]: the role of the last token
                straight = straight[:, :, None] * ends[:, None]
                scores = straight if effect == "direct" else scores - straight
            yield batch, scores

    with untouched(model), torch.no_grad():
        per_fact = fact_means(len(facts), scored())
    return ComponentScores(
        method="path_patching",
        metric=metric,
        sign=f"{effect} effect, {'logits' if metric == 'logit_diff' else 'share of pairs'}; positive: the component's "
        "value on the fact's own run supports the true answer",
        components=components,
        per_fact=per_fact,
        options={
            "effect": effect,
            "form": form,
            "metric": metric,
            "kinds": list(kinds),
            "pairs_per_fact": pairs_per_fact,
            "batch_size": batch_size,
            "seed": seed,
        },
        facts_sha256=hash_facts(facts),
        notes=describe_pairs(pairs),
    )
