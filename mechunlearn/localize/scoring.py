"""From exact effects to scores: which tokens, which metric, and the mean over a fact's pairs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.components import ROLES, Component
from mechunlearn.localize.pairs import SUBJECT_ROLES, Pair, PairBatch, fact_means
from mechunlearn.localize.patching import Exchange, Measure, component_effects
from mechunlearn.models import Model

Metric = Literal["logit_diff", "accuracy", "probability"]
RoleGroup = Literal["subject_first", "subject_middle", "subject_last", "between", "last", "subject", "all"]
ROLE_GROUPS: Mapping[str, tuple[str, ...]] = {role: (role,) for role in ROLES} | {
    "subject": SUBJECT_ROLES,
    "all": ROLES,
}


def at_roles(batch: PairBatch, roles: Sequence[str]) -> Bool[Tensor, "role batch aligned"]:
    """The aligned tokens of each role or group of roles."""
    groups = [[ROLES.index(role) for role in ROLE_GROUPS[name]] for name in roles]
    return torch.stack([batch.roles[:, :, group].any(dim=2) for group in groups])


def measure_of(batch: PairBatch, metric: Metric) -> Measure:
    """The metric of a batch's pairs: the logit difference, P(true answer), or whether it beats all other candidates."""

    def logit_diff(logits: Tensor, rows: Tensor) -> Tensor:
        own = torch.arange(len(rows), device=rows.device)
        return logits[own, batch.answer[rows]] - logits[own, batch.counterfactual[rows]]

    def probability(logits: Tensor, rows: Tensor) -> Tensor:
        return logits.softmax(dim=-1)[torch.arange(len(rows), device=rows.device), batch.answer[rows]]

    def accuracy(logits: Tensor, rows: Tensor) -> Tensor:
        chosen = replace(batch, pairs=tuple(batch.pairs[row] for row in rows.tolist())).chosen(logits)
        return (chosen == batch.answer[rows]).to(logits.dtype)

    return {"logit_diff": logit_diff, "probability": probability, "accuracy": accuracy}[metric]


def exact_scores(
    model: Model,
    n_facts: int,
    prepared: Iterable[Exchange],
    components: Sequence[Component],
    roles: Sequence[str],
    *,
    metric: Metric,
    batch_size: int,
    window: int = 1,
) -> tuple[Float[np.ndarray, "fact component role"], dict[str, float]]:
    """Effects averaged over each fact's pairs, and the metric's mean on the unchanged runs, by name."""
    metrics: dict[str, list[float]] = {}

    def scored() -> Iterator[tuple[PairBatch, Tensor]]:
        for given in prepared:
            batch, measure, selected = given.batch, measure_of(given.batch, metric), at_roles(given.batch, roles)
            rows = torch.arange(len(batch.pairs), device=model.device)
            for name, logits in given.logits.items():
                metrics.setdefault(f"{metric}_{name}", []).extend(measure(logits, rows).tolist())
            yield (
                batch,
                component_effects(model, given, components, selected, measure, window=window, batch_size=batch_size),
            )

    per_fact = fact_means(n_facts, scored())
    return per_fact, {name: float(np.mean(values)) for name, values in metrics.items()}


def whole(pair: Pair) -> Pair:
    """The pair with its clean prompt on both sides: every token has a partner, only answers are compared."""
    aligned = tuple((i, i, ROLES.index(role)) for i, role in enumerate(clean_roles(pair)))
    return replace(pair, corrupt=pair.clean, aligned=aligned)


def clean_roles(pair: Pair) -> tuple[str, ...]:
    """The role of every token of a pair's clean prompt, as `prompts.token_roles` gives them."""
    roles = ["between"] * len(pair.clean)
    roles[-1] = "last"
    for position in pair.subject:
        roles[position] = "subject_middle"
    roles[pair.subject[0]] = "subject_first"
    roles[pair.subject[-1]] = "subject_last"
    return tuple(roles)
