"""What each kind of dictionary is trained to minimise: error, few features, and no dead ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

TrainedKind = Literal["relu", "topk", "batchtopk", "jumprelu", "gated"]
BANDWIDTH = 0.05  # of the jump's pseudo-derivative, for vectors whose norm is sqrt(d) on average
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Features:
    """A batch of vectors in features, with what training needs beside them."""

    values: Float[Tensor, "token d_sae"]
    pre: Float[Tensor, "token d_sae"]
    """Before the nonlinearity; of which dead features are revived."""
    penalty: Tensor
    """To be added to the error."""


def relu(x: Tensor, w: Weights, *, sparsity: float, **_: Any) -> Features:
    """Error + sparsity * L1 norm of the features, whose directions are unit vectors. Source: arXiv:2309.08600."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    values = pre.relu()
    return Features(values=values, pre=pre, penalty=sparsity * values.sum(-1).mean())


def topk(x: Tensor, w: Weights, *, k: int, **_: Any) -> Features:
    """The k largest of each vector. Source: Gao et al. 2024, arXiv:2406.04093."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    best = pre.topk(k, dim=-1)
    values = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    return Features(values=values, pre=pre, penalty=x.new_zeros(()))


def batchtopk(x: Tensor, w: Weights, *, k: int, **_: Any) -> Features:
    """The k * n largest of all n vectors: easy ones take fewer. Source: Bussmann et al. 2024, arXiv:2412.06410."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    positive = pre.relu()
    least = _largest(positive.detach(), k * len(x))
    return Features(values=positive * (positive >= least), pre=pre, penalty=x.new_zeros(()))


def jumprelu(x: Tensor, w: Weights, *, sparsity: float, **_: Any) -> Features:
    """Error + sparsity * number of features on, with straight-through thresholds. Source: arXiv:2407.14435."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    values, on = _Jump.apply(pre.relu(), w["threshold"].clamp(min=0))
    return Features(values=values, pre=pre, penalty=sparsity * on.sum(-1).mean())


def gated(x: Tensor, w: Weights, *, sparsity: float, **_: Any) -> Features:
    """Error + sparsity * L1 of the gate + error of the gate alone, decoder frozen. Source: arXiv:2404.16014."""
    projected = (x - w["b_dec"]) @ w["W_enc"]
    gate = projected + w["b_gate"]
    values = (projected * w["r_mag"].exp() + w["b_mag"]).relu() * (gate > 0)
    alone = gate.relu() @ w["W_dec"].detach() + w["b_dec"].detach()
    penalty = sparsity * gate.relu().sum(-1).mean() + (alone - x).pow(2).sum(-1).mean()
    return Features(values=values, pre=gate, penalty=penalty)


OBJECTIVES: Mapping[TrainedKind, Callable[..., Features]] = {
    "relu": relu, "topk": topk, "batchtopk": batchtopk, "jumprelu": jumprelu, "gated": gated,
}  # fmt: skip


def revival(error: Tensor, features: Features, w: Weights, dead: Bool[Tensor, " d_sae"], k: int) -> Tensor:
    """How much of the error the `k` strongest dead features leave, as a share of it; 0 where none is dead.

    Source: Gao et al. 2024, arXiv:2406.04093, section 2.4 (AuxK), for every kind of dictionary here.
    """
    if not (n := min(k, int(dead.sum()))):
        return error.new_zeros(())
    best = features.pre[:, dead].topk(n, dim=-1)
    # as they are, below 0 too: a feature whose input never gets above 0 would have no gradient to come back by
    revived = torch.zeros_like(features.pre[:, dead]).scatter(-1, best.indices, best.values)
    left = (error.detach() - revived @ w["W_dec"][dead]).pow(2).sum(-1).mean()
    return left / error.detach().pow(2).sum(-1).mean().clamp(min=1e-12)


def _largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of all values. On a CPU numpy's selection takes a tenth of the time of torch's."""
    if values.device.type != "cpu":
        return values.flatten().topk(n).values[-1]
    place = values.numel() - n
    return torch.tensor(np.partition(values.flatten().numpy(), place)[place])


class _Jump(torch.autograd.Function):
    """pre where it is above the threshold, and whether it is; thresholds learn within `BANDWIDTH` of themselves."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        on = (pre > threshold).to(pre.dtype)
        return pre * on, on

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        of_values, of_on = grads
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype) / BANDWIDTH
        return of_values * (pre > threshold), -(near * (threshold * of_values + of_on)).sum(0)
