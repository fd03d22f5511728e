"""Learned masks: the fewest components that must keep their own activations for the answer to stay."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Place, by_place, last_logits, untouched
from mechunlearn.components import ROLES, ComponentScores, Kind
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.gates import gated_logits, hard_concrete, probability_open, settled
from mechunlearn.localize.kinds import components_of
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs, describe_pairs, record_donor
from mechunlearn.models import Model

_START = 2.0  # gates start open: P(gate > 0) = 0.97


@LOCALIZERS.register(
    "learned_mask", source="Louizos et al. 2018, arXiv:1712.01312; De Cao et al. 2020, arXiv:2004.14992"
)
def learned_mask(
    model: Model,
    facts: Sequence[Fact],
    *,
    kinds: tuple[Kind, ...] = ("mlp", "attention"),
    gates: Literal["shared", "per_fact"] = "shared",
    by_role: bool = False,
    steps: Annotated[int, Field(ge=1)] = 200,
    learning_rate: Annotated[float, Field(gt=0)] = 0.1,
    sparsity: Annotated[float, Field(ge=0)] = 2.0,
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Train a gate z in [0, 1] per component, z * own + (1 - z) * donor's activation, and score how open it stays.

    On the fact's run every gated component writes, at each token that both prompts have, its own value as it comes out
    there (downstream of other gates) mixed with its value on the donor's run. Minimised with Adam over the gates'
    logits alone: mean over pairs of log(1 + exp(-logit_diff)) + sparsity * mean over gates of P(z > 0), where z is hard
    concrete: clamp(sigmoid((log u - log(1 - u) + logit) / beta) * (zeta - gamma) + gamma, 0, 1), u uniform.

    Shapes: [fact component role]; roles are `components.ROLES` with `by_role`, else only "all".
    Sign and units: E[z] in [0, 1] (summed over roles). 1: the component's own value is needed for the true answer;
        0: it may be the donor's. Components that do the same can stand in for each other, and one of them is closed.

    Args:
        gates: "shared": one set for all facts, whose rows are then equal; "per_fact": one each, less certain.
        by_role: a gate for each token role of each component.
        steps: of Adam, one batch each.
        sparsity: lambda, in nats for all gates open; small values leave everything open.
        pairs_per_fact: donors per fact, see `pairs.build_pairs`.

    Returns:
        Scores whose notes hold loss_first and loss_last (means over a tenth of the steps), and the mean logit_diff on
        the fact's own run (logit_diff_clean), under the mask at test time (logit_diff_kept) and with all gates closed.

    Raises:
        ValueError: no facts, no kinds, or a fact that cannot be paired.

    Differs from the sources: activations are gated, against another subject's and not against zero or a learnt mean.
    Source: Louizos et al. 2018, arXiv:1712.01312, section 2.2; De Cao et al. 2020, arXiv:2004.14992; Cao et al. 2021,
        arXiv:2104.03514 (masks over a trained model).
    """
    order = sorted(range(len(facts)), key=lambda i: facts[i].key)  # so that the facts' order changes no batch
    pairs = build_pairs(model, [facts[i] for i in order], pairs_per_fact=pairs_per_fact, seed=seed)
    components = components_of(model, "learned_mask", kinds)
    roles = ROLES if by_role else ("all",)
    places = by_place(components)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(facts) if gates == "per_fact" else 1, len(components), len(roles))
    logits = torch.full(shape, _START, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=learning_rate)
    losses: list[float] = []
    with untouched(model):
        prepared = [(batch, record_donor(model, batch, list(places))) for batch in batches(model, pairs, batch_size)]
        left: list[int] = []
        for _ in range(steps):
            left = left or torch.randperm(len(prepared), generator=generator).tolist()
            batch, donors = prepared[left.pop()]
            noise = torch.rand((len(batch.pairs), *shape[1:]), generator=generator).to(model.device)
            with torch.enable_grad():
                own = logits[_rows(batch, shape[0])]
                found = batch.logit_diff(gated_logits(model, batch, donors, hard_concrete(own, noise), places))
                loss = F.softplus(-found).mean() + sparsity * probability_open(own).mean()
                (logits.grad,) = torch.autograd.grad(loss, [logits])
            adam.step()
            losses.append(float(loss.detach()))
        trained = logits.detach()
        kept = [_mean_logit_diff(model, prepared, gate, places) for gate in (None, settled(trained), 0 * trained)]
    midpoints = (torch.arange(1000, device=trained.device) + 0.5) / 1000
    openness = hard_concrete(trained[..., None], midpoints).mean(dim=-1).double().cpu().numpy()
    per_fact = np.empty((len(facts), *shape[1:]))
    per_fact[order] = openness
    tenth = max(1, steps // 10)
    return ComponentScores(
        method="learned_mask",
        metric="logit_diff",
        sign="mean openness of the gate in [0, 1]; 1: the component's own value is needed for the true answer",
        components=components,
        roles=roles,
        per_fact=per_fact,
        options={
            "kinds": list(kinds), "gates": gates, "by_role": by_role, "steps": steps, "learning_rate": learning_rate,
            "sparsity": sparsity, "pairs_per_fact": pairs_per_fact, "batch_size": batch_size, "seed": seed,
        },
        facts_sha256=hash_facts(facts),
        notes={
            **describe_pairs(pairs),
            "loss_first": float(np.mean(losses[:tenth])),
            "loss_last": float(np.mean(losses[-tenth:])),
            **dict(zip(("logit_diff_clean", "logit_diff_kept", "logit_diff_closed"), kept, strict=True)),
        },
    )  # fmt: skip


def _rows(batch: PairBatch, n_rows: int) -> list[int]:
    """The row of gates that each pair uses."""
    return [pair.fact if n_rows > 1 else 0 for pair in batch.pairs]


def _mean_logit_diff(
    model: Model,
    prepared: Sequence[tuple[PairBatch, dict[Place, Tensor]]],
    gates: Tensor | None,
    places: dict[Place, list[int]],
) -> float:
    """Mean over all pairs under fixed gates; None leaves the run alone."""
    found: list[float] = []
    with torch.no_grad():
        for batch, donors in prepared:
            if gates is None:
                logits = last_logits(model, batch.clean)
            else:
                logits = gated_logits(model, batch, donors, gates[_rows(batch, len(gates))], places)
            found += batch.logit_diff(logits).tolist()
    return float(np.mean(found))
