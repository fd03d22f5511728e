"""The residual stream at a subject's last token, and what is left of it without the answer."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Place
from mechunlearn.edit.keys_values import Row, means_at_subjects
from mechunlearn.facts import Fact
from mechunlearn.models import Model
from mechunlearn.prompts import CHOICE, forms, render, token_roles

SHRINKAGE = 0.05


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A fact in one form."""

    fact: Fact
    form: str
    row: Row


def asked_texts(model: Model, facts: Sequence[Fact]) -> list[Asked]:
    """Every fact in every form it has but multiple choice, whose options name the answer; each text by itself."""
    found: list[Asked] = []
    for fact in facts:
        for form in (form for form in forms(fact) if form != CHOICE):
            ids, roles = token_roles(model, render(fact, form), fact.subject)
            # a target is what makes `means_at_subjects` look at the row
            row = Row(subject=len(found), ids=tuple(ids), at=roles.index("subject_last"), targets=(0,))
            found.append(Asked(fact=fact, form=form, row=row))
    return found


def streams_of(
    model: Model, asked: Sequence[Asked], layers: Sequence[int], *, batch_size: int
) -> dict[int, Float[Tensor, "text d_model"]]:
    """The stream after each layer at the subject's last token of each text, in their order; float64."""
    return _at_subjects(model, asked, [("block", layer) for layer in layers], batch_size)


def keys_of(
    model: Model, asked: Sequence[Asked], layers: Sequence[int], *, batch_size: int
) -> dict[int, Float[Tensor, "text d_mlp"]]:
    """What each layer's MLP output projection reads there; float64."""
    return _at_subjects(model, asked, [("neuron", layer) for layer in layers], batch_size)


def _at_subjects(
    model: Model, asked: Sequence[Asked], places: Sequence[Place], batch_size: int
) -> dict[int, Float[Tensor, "text width"]]:
    if not asked:
        widths = {layer: model.d_mlp if kind == "neuron" else model.d_model for kind, layer in places}
        return {layer: torch.zeros(0, n, dtype=torch.float64, device=model.device) for layer, n in widths.items()}
    rows = [replace(one.row, subject=i) for i, one in enumerate(asked)]
    found = means_at_subjects(model, rows, places, batch_size=batch_size)
    return {layer: found[kind, layer] for kind, layer in places}


def erased(
    model: Model, asked: Sequence[Asked], others: Sequence[Asked], layers: Sequence[int], *, batch_size: int
) -> dict[int, Float[Tensor, "text d_model"]]:
    """Where the stream of each text should be after each layer: h - P (h - mu), see `answer_eraser`.

    mu and P are of all texts of the same relation and form, `others` included. A relation with a single answer has
    nothing to erase.
    """
    everything = [*asked, *others]
    streams = streams_of(model, everything, layers, batch_size=batch_size)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, one in enumerate(everything):
        groups[one.fact.relation, one.form].append(i)
    wanted: dict[int, Tensor] = {}
    for layer, stream in streams.items():
        goal = stream[: len(asked)].clone()
        for group in groups.values():
            mean, projection = answer_eraser(stream[group], [everything[i].fact.target_true for i in group])
            own = [i for i in group if i < len(asked)]
            goal[own] -= (stream[own] - mean) @ projection.T
        wanted[layer] = goal
    return wanted


def answer_eraser(
    streams: Float[Tensor, "text d_model"], answers: Sequence[str]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_model"]]:
    """(mu, P) such that no linear probe tells the answers apart in h - P (h - mu), the nearest to h of all such.

    P = S^(1/2) Q Q^T S^(-1/2), with S the covariance of the texts' streams, shrunk by `SHRINKAGE` of its mean variance
    (texts are few), and Q an orthonormal basis of the answers' whitened means.

    Source: LEACE, Belrose et al. 2023, arXiv:2306.03819, theorem 4.3.
    """
    mean, names = streams.mean(dim=0), sorted(set(answers))
    means = torch.stack([streams[[i for i, a in enumerate(answers) if a == name]].mean(dim=0) for name in names]) - mean
    centred = streams - mean
    covariance = centred.T @ centred / len(streams)
    ridge = SHRINKAGE * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
    variances, axes = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance)).to(covariance))
    whiten, colour = axes * variances.rsqrt() @ axes.T, axes * variances.sqrt() @ axes.T
    _, sizes, directions = torch.linalg.svd(means @ whiten, full_matrices=False)
    basis = directions[sizes > 1e-6 * sizes[0]] if sizes[0] > 0 else directions[:0]
    return mean, colour @ basis.T @ basis @ whiten
