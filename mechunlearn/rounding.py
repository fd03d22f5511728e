"""Rounding weights to a few bits: what int8 and int4 checkpoints keep of them, and of a change to them."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


def round_to_nearest(weight: Float[Tensor, "out in"], *, bits: int, group_size: int = 0) -> Float[Tensor, "out in"]:
    """The weight as a quantised checkpoint holds it: symmetric, round-to-nearest (ties to even), no data needed.

    W' = s round(W / s), with s = max|W| / (2^(bits - 1) - 1) in each row, or in each `group_size` inputs of a row.
    No entry moves by more than s / 2.

    Args:
        weight: rows are output channels; transpose GPT-2's Conv1D.
        bits: 2 to 8; codes are from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
        group_size: inputs that share a scale; 0 for the whole row. The last group of a row may be smaller.

    Returns:
        A new tensor in the weight's own dtype; computed in float32 (float64 stays).

    Raises:
        ValueError: not a matrix, or bits or group_size out of range.

    Source: the plain form of LLM.int8()'s vector-wise absmax, Dettmers et al. 2022, arXiv:2208.07339, section 2.
    """
    groups = _grouped(weight, bits, group_size)
    scale = _scale(groups, bits)
    return _ungrouped(torch.round(groups / scale) * scale, weight).to(weight.dtype)


def code_flips(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], *, bits: int, group_size: int = 0
) -> Bool[Tensor, "out in"]:
    """Which weights have another integer code after an edit, on the grid of the weights before it.

    One grid for both, for an edit that changes a row's largest weight would otherwise shift the codes of weights that
    it never touched, and one that doubles a whole row would shift none. Arguments and errors as `round_to_nearest`.
    """
    if before.shape != after.shape:
        raise ValueError(f"code flips: got shapes {tuple(before.shape)} and {tuple(after.shape)}, allowed: equal ones")
    groups = _grouped(before, bits, group_size)
    scale = _scale(groups, bits)
    flips: Int[Tensor, "group input"] = torch.round(groups / scale) != torch.round(
        _grouped(after, bits, group_size) / scale
    )
    return _ungrouped(flips, before)


def code_flip_rate(
    before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], *, bits: int, group_size: int = 0
) -> float:
    """Share of weights that an edit moves to another integer code: f = E[1(Q(w + Delta) != Q(w))].

    Sign and units: in [0, 1], of all entries of the matrix; never above the share of entries that changed. Near 0, the
    edit is gone after rounding: changes of less than half a step mostly vanish.

    Source: Zhang et al. 2024, arXiv:2410.16454 (why quantisation brings unlearned knowledge back).
    """
    return float(code_flips(before, after, bits=bits, group_size=group_size).float().mean())


def _grouped(weight: Tensor, bits: int, group_size: int) -> Float[Tensor, "group input"]:
    """One row a group; the last of each row filled up with zeros, which change no group's largest entry."""
    if weight.ndim != 2 or not MIN_BITS <= bits <= MAX_BITS or group_size < 0:
        raise ValueError(
            f"rounding: got a tensor of shape {tuple(weight.shape)}, bits {bits}, group_size {group_size}, "
            f"allowed: a matrix, bits {MIN_BITS} to {MAX_BITS}, group_size >= 0 (0: the whole row)"
        )
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    size = min(group_size or weight.shape[1], weight.shape[1])
    return torch.nn.functional.pad(values, (0, -weight.shape[1] % size)).reshape(-1, size)


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    return groups.reshape(len(like), -1)[:, : like.shape[1]]


def _scale(groups: Float[Tensor, "group input"], bits: int) -> Float[Tensor, "group 1"]:
    scale = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros stays one
