"""Sets of parameter entries: parameter name -> bools that broadcast to its shape. What masks are made of."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.models import Model, oriented

Entries = Mapping[str, Bool[Tensor, "..."]]
Shapes = Mapping[str, tuple[int, ...]]


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.hf.named_parameters()}


def n_entries(entries: Entries, shapes: Shapes) -> int:
    """How many there are: each true entry of a broadcast mask stands for as many as it is repeated."""
    return sum(int(mask.sum()) * (torch.Size(shapes[name]).numel() // mask.numel()) for name, mask in entries.items())


def join(union: dict[str, Tensor], entries: Entries) -> None:
    """Add entries to a union, in place."""
    for name, mask in entries.items():
        union[name] = union[name] | mask if name in union else mask


def beyond(entries: Entries, union: Entries) -> dict[str, Tensor]:
    """The entries that are not in the union."""
    return {name: mask & ~union[name] if name in union else mask for name, mask in entries.items()}


def common(one: Entries, other: Entries) -> dict[str, Tensor]:
    """The entries that are in both."""
    return {name: mask & other[name] for name, mask in one.items() if name in other}


def first_entries(model: Model, entries: Entries, n: int) -> dict[str, Tensor]:
    """The first n of the entries: parameter by parameter as they are listed, a matrix output by output."""
    shapes, first = parameter_shapes(model), {}
    for name, mask in entries.items():
        size = n_entries({name: mask}, shapes)
        if size <= n:
            first[name] = mask
        elif n:
            full = oriented(model, name, mask.expand(shapes[name]))
            flat = full.reshape(-1)
            cut = (flat & (flat.cumsum(0) <= n)).reshape(full.shape)
            first[name] = oriented(model, name, cut).contiguous()
        n = max(n - size, 0)
    return first
