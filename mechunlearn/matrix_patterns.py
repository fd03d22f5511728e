"""What a mask has of one matrix of a layer, and the same drawn anew among the entries that are free.

Everything is seen as [out in], wherever the model keeps it: transposed, or with q, k and v in one parameter.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.components import Matrix
from mechunlearn.entries import Entries
from mechunlearn.models import Model, matrix_parameters, oriented


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """How many of the outputs, the inputs or the single weights of a matrix, and how many of its biases."""

    of: Literal["outputs", "inputs", "weights"]
    n: int
    n_biases: int
    n_weights: int
    """Number of weights in all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """The selected entries of one matrix. The weights broadcast to [out in]; without biases there are none of them."""

    weights: Bool[Tensor, "out in"]
    biases: Bool[Tensor, " out"]
    shape: tuple[int, int]

    @cached_property
    def n_weights(self) -> int:
        """Number of selected weights."""
        return int(self.weights.sum()) * (self.shape[0] * self.shape[1] // self.weights.numel())

    def pattern(self) -> Pattern | None:
        """How many of what; None if nothing is selected."""
        n_out, n_in = self.shape
        n, n_biases = self.n_weights, int(self.biases.sum())
        if not n and not n_biases:
            return None
        if self.weights.shape[1] == 1:
            return Pattern(of="outputs", n=n // n_in, n_biases=n_biases, n_weights=n)
        if self.weights.shape[0] == 1:
            return Pattern(of="inputs", n=n // n_out, n_biases=n_biases, n_weights=n)
        return Pattern(of="weights", n=n, n_biases=n_biases, n_weights=n)

    def free(self, pattern: Pattern) -> Bool[Tensor, " unit"]:
        """Which outputs, inputs or weights hold no selected entry (an output's bias counts as one of its entries)."""
        n_out, n_in = self.shape
        if pattern.of == "weights":
            return ~self.weights.expand(n_out, n_in).reshape(-1)
        if pattern.of == "inputs":
            return ~self.weights.any(0).expand(n_in)
        outputs = ~self.weights.any(1).expand(n_out)
        return outputs & ~self.biases if len(self.biases) else outputs

    def has_room(self, pattern: Pattern) -> bool:
        """Whether the pattern fits beside the selected entries."""
        own = pattern.of == "outputs" and pattern.n_biases <= pattern.n  # the biases of free outputs are free
        if not own and int((~self.biases).sum()) < pattern.n_biases:
            return False
        if pattern.of == "weights":
            return self.shape[0] * self.shape[1] - self.n_weights >= pattern.n
        return int(self.free(pattern).sum()) >= pattern.n


def seen_in(model: Model, entries: Entries, layer: int, matrix: Matrix) -> Seen | None:
    """The entries of one matrix among those given; None for a matrix that the model does not have."""
    own = matrix_parameters(model, layer, matrix)
    if not own:
        return None
    weight, *bias = own
    d_out, d_in = oriented(model, weight, model.hf.get_parameter(weight)).shape
    mine = oriented(model, weight, own[weight]).expand(d_out, 1)[:, 0]
    weights = oriented(model, weight, entries.get(weight, torch.zeros(1, 1, dtype=torch.bool)))
    if not mine.all():
        weights = weights.expand(d_out, -1)[mine]
    biases = [entries.get(name, torch.zeros(1, dtype=torch.bool)).expand(d_out)[mine] for name in bias]
    return Seen(
        weights=weights,
        biases=torch.cat([torch.zeros(0, dtype=torch.bool), *biases]),
        shape=(int(mine.sum()), d_in),
    )


def draw(
    model: Model, layer: int, matrix: Matrix, pattern: Pattern, occupied: Seen, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw the pattern among the free entries of a matrix; biases are first those of the drawn outputs."""
    n_out, n_in = occupied.shape
    units = _drawn(occupied.free(pattern), pattern.n, generator)
    views = {"outputs": (n_out, 1), "inputs": (1, n_in), "weights": (n_out, n_in)}
    first = units if pattern.of == "outputs" else torch.zeros(n_out, dtype=torch.bool)
    biases = _drawn(first, min(pattern.n_biases, int(first.sum())), generator)
    if len(occupied.biases):
        biases |= _drawn(~occupied.biases & ~biases, pattern.n_biases - int(biases.sum()), generator)
    own = matrix_parameters(model, layer, matrix)
    weight, *bias = own
    chosen = {weight: _placed(model, weight, own[weight], units.reshape(views[pattern.of]))}
    return chosen | {name: _placed(model, name, own[name], biases) for name in bias}


def _drawn(free: Tensor, n: int, generator: torch.Generator) -> Tensor:
    among = free.nonzero()[:, 0]
    chosen = among[torch.randperm(len(among), generator=generator)[:n]]
    return torch.zeros(len(free), dtype=torch.bool).index_fill(0, chosen, True)


def _placed(model: Model, name: str, own: Tensor, chosen: Tensor) -> Tensor:
    """A choice among a matrix' own entries as a mask of the parameter that holds them."""
    if chosen.all():
        return own
    own = oriented(model, name, own)
    if own.numel() == 1:  # the whole parameter
        return oriented(model, name, chosen)
    where = own.reshape(-1)
    placed = torch.zeros(len(where), *chosen.shape[1:], dtype=torch.bool)
    placed[where] = chosen.expand(int(where.sum()), *chosen.shape[1:])
    return oriented(model, name, placed)
