"""Exact patching: put a place's values of one run into another run, cell by cell, and measure what changes.

A *cell* is a place (MLP, attention, head or block, or a window of layers) at some tokens of every pair of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.activations import Change, Place
from mechunlearn.components import Component
from mechunlearn.localize.pairs import PairBatch
from mechunlearn.localize.restart import Run, read_out, record, restart
from mechunlearn.models import Model

Measure = Callable[[Float[Tensor, "row d_vocab"], Int[Tensor, " row"]], Float[Tensor, " row"]]
"""Logits and the pairs of the batch that they are of -> one number each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """A run, and for some places the values that may take the place of its own."""

    batch: PairBatch
    run: Run
    values: Mapping[Place, Tensor]
    """[batch pos width], moved to the run's own tokens; 0 where a token has no partner."""
    positions: Int[Tensor, "batch aligned"]
    """Where the run has the batch's aligned tokens."""
    sign: int
    """1 where the values put in are the fact's own, -1 where they replace them: positive effects support the fact."""
    logits: Mapping[str, Float[Tensor, "batch d_vocab"]]
    """Of the unchanged runs: "clean" and, if there is one, "corrupt"."""

    def cells(self, selected: Bool[Tensor, "cell batch aligned"]) -> Bool[Tensor, "cell batch pos"]:
        """The run's tokens that each cell changes."""
        changed = selected.new_zeros(*selected.shape[:2], self.run.tokens.ids.shape[1])
        cell, row, place = selected.nonzero(as_tuple=True)
        changed[cell, row, self.positions[row, place]] = True
        return changed


def exchange(
    model: Model, batch: PairBatch, places: Sequence[Place], *, restore: bool, embed: Change | None = None
) -> Exchange:
    """Run both prompts of every pair; call without gradients, inside `untouched`.

    Args:
        restore: put clean values into the corrupt run (denoising), or else corrupt values into the clean run (noising).
        embed: changes the corrupt run's embeddings.
    """
    clean = record(model, batch.clean, places)
    corrupt = record(model, batch.corrupt, places, embed=embed)
    run, donor = (corrupt, clean) if restore else (clean, corrupt)
    positions, origin = batch.clean_positions, batch.corrupt_positions
    if restore:
        positions, origin = origin, positions
    row, place = batch.roles.any(dim=2).nonzero(as_tuple=True)
    values: dict[Place, Tensor] = {}
    for key in dict.fromkeys(places):
        values[key] = torch.zeros_like(run.activations[key])
        values[key][row, positions[row, place]] = donor.activations[key][row, origin[row, place]]
    logits = {"clean": clean.logits, "corrupt": corrupt.logits}
    return Exchange(batch=batch, run=run, values=values, positions=positions, sign=1 if restore else -1, logits=logits)


def cell_effects(
    model: Model,
    given: Exchange,
    places: Sequence[Place],
    changed: Bool[Tensor, "cell batch pos"],
    measure: Measure,
    *,
    columns: Bool[Tensor, "cell width"] | None = None,
    batch_size: int = 128,
) -> Float[Tensor, "cell batch"]:
    """What each cell does to the metric, exactly: every cell changes the same place or places at tokens of its own.

    Cells are sorted by their first changed token and cut into batches, each of which restarts after the first place and
    runs only from its first changed token on. What cannot reach the last token (the last block elsewhere) is not run.

    Sign and units: the metric's. Positive: the fact's own values support the true answer.

    Args:
        places: one place, or one kind in several layers, the lowest first.
        columns: which columns of the place a cell changes (heads); all, if not given.
        batch_size: changed runs at once.
    """
    run, (kind, layer) = given.run, places[0]
    last = run.tokens.last
    effects = torch.zeros(changed.shape[:2], dtype=run.logits.dtype, device=run.logits.device)
    every = torch.arange(len(last), device=last.device)
    before = measure(run.logits, every)
    if layer == model.n_layers - 1:
        changed = changed & (torch.arange(changed.shape[2], device=last.device) == last[:, None])
    cell, row = changed.any(dim=2).nonzero(as_tuple=True)
    first = changed.int().argmax(dim=2)[cell, row]
    for chosen in first.argsort(stable=True).split(batch_size):
        c, r = cell[chosen], row[chosen]
        prefix, stop = int(first[chosen[0]]), int(last[r].max()) + 1
        mask = changed[c, r, prefix:stop, None]
        mask = mask if columns is None else mask & columns[c][:, None]
        swaps = {place: _swap(mask, given.values[place][r, prefix:stop]) for place in places}
        if kind in ("mlp", "block"):  # its write is only added to the stream, so its own block need not run
            stream = run.stream(layer + 1)[r, prefix:stop]
            own = run.activations[places[0]][r, prefix:stop]
            stream = stream + (swaps.pop(places[0])(own) - own)
            start = layer + 1
        else:
            stream, start = run.stream(layer)[r, prefix:stop], layer
        if start == model.n_layers:
            logits = read_out(model, run, stream[torch.arange(len(r), device=r.device), last[r] - prefix])
        else:
            logits = restart(model, run, r, start, stream, prefix=prefix, change=swaps)
        effects[c, r] = measure(logits, r) - before[r]
    return given.sign * effects


def _swap(mask: Tensor, values: Tensor) -> Change:
    return lambda own: torch.where(mask, values, own)


def component_effects(
    model: Model,
    given: Exchange,
    components: Sequence[Component],
    selected: Bool[Tensor, "cell batch aligned"],
    measure: Measure,
    *,
    window: int = 1,
    batch_size: int = 128,
) -> Float[Tensor, "batch component cell"]:
    """`cell_effects` of every component at every selection of tokens; `window` layers around it are changed at once."""
    changed = given.cells(selected)
    effects = torch.zeros(len(components), *changed.shape[:2], dtype=given.run.logits.dtype, device=changed.device)
    members: dict[Place, list[int]] = {}
    for index, component in enumerate(components):
        members.setdefault(place_of(component), []).append(index)
    for (kind, layer), indices in members.items():
        places: list[Place] = [(kind, near) for near in window_of(layer, window, model.n_layers)]
        heads = [components[index].index for index in indices]
        columns = None if kind != "head" else head_columns(model, heads).repeat_interleave(len(changed), dim=0)
        cells = changed.repeat(len(indices), 1, 1)
        found = cell_effects(model, given, places, cells, measure, columns=columns, batch_size=batch_size)
        effects[indices] = found.unflatten(0, (len(indices), -1))
    return effects.permute(2, 0, 1)


def window_of(layer: int, window: int, n_layers: int) -> range:
    """The layers [layer - window // 2, layer + (window + 1) // 2) that the model has."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


def head_columns(model: Model, heads: Sequence[int | None]) -> Bool[Tensor, "head width"]:
    """Where each head is in z, the input of attention's output projection."""
    owner = torch.arange(model.n_heads, device=model.device).repeat_interleave(model.d_head)
    return torch.stack([owner == head for head in heads])


def place_of(component: Component) -> Place:
    """Where a component's values are seen; a head's are columns of its layer's."""
    assert component.kind != "neuron"  # no exact method offers neurons
    return component.kind, component.layer
