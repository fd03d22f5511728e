"""Exact patching: put a place's values of one run into another run, cell by cell, and measure what changes.

A *cell* is a place (MLP, attention, head or block, or a window of layers) at some tokens of every pair of a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.activations import Change, Place, by_place
from mechunlearn.components import Component
from mechunlearn.localize.pairs import PairBatch
from mechunlearn.localize.restart import Run, after_attention, read_out, record, restart
from mechunlearn.models import Model, attention_write, head_input

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
    sublayers: list[Place] = [("attention", layer) for kind, layer in places if kind == "head"]
    clean = record(model, batch.clean, [*places, *sublayers])
    corrupt = record(model, batch.corrupt, [*places, *sublayers], embed=embed)
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

    Cells are sorted by their first changed token and cut into batches, each of which restarts above the first place and
    runs only from its first changed token on. What cannot reach the last token (the last block elsewhere) is not run.

    Sign and units: the metric's. Positive: the fact's own values support the true answer.

    Args:
        places: one place, or one kind in several layers, the lowest first.
        columns: which columns of the place a cell changes (heads); all, if not given.
        batch_size: changed runs at once.
    """
    run, (_, layer) = given.run, places[0]
    last = run.tokens.last
    effects = torch.zeros(changed.shape[:2], dtype=run.logits.dtype, device=run.logits.device)
    before = measure(run.logits, torch.arange(len(last), device=last.device))
    if layer == model.n_layers - 1:
        changed = changed & (torch.arange(changed.shape[2], device=last.device) == last[:, None])
    cell, row = changed.any(dim=2).nonzero(as_tuple=True)
    first = changed.int().argmax(dim=2)[cell, row]
    order = first.argsort(stable=True)
    cell, row = cell[order], row[order]
    for start, end, prefix in _cuts(first[order].tolist(), (last[row] + 1).tolist(), batch_size):
        c, r = cell[start:end], row[start:end]
        stop = int(last[r].max()) + 1
        item, token = changed[c, r].nonzero(as_tuple=True)
        picked = None if columns is None else columns[c[item]]
        stream = run.stream(layer + 1)[r, prefix:stop].clone()
        stream[item, token - prefix] = _stream_after(model, given, places[0], r[item], token, picked)
        if layer == model.n_layers - 1:
            logits = read_out(model, run, stream[torch.arange(len(r), device=r.device), last[r] - prefix])
        else:
            mask = changed[c, r, prefix:stop, None]
            above = {place: _swap(mask, given.values[place][r, prefix:stop]) for place in places[1:]}
            logits = restart(model, run, r, layer + 1, stream, prefix=prefix, change=above)
        effects[c, r] = measure(logits, r) - before[r]
    return given.sign * effects


def _cuts(first: Sequence[int], end: Sequence[int], size: int) -> Iterator[tuple[int, int, int]]:
    """(from, to, first token run) of batches of cells sorted by their first changed token.

    A batch is closed when a tenth of the tokens it runs are before their cells' first changed token.
    """
    start = wasted = run = 0
    for i, (token, stop) in enumerate(zip(first, end, strict=True)):
        wasted, run = wasted + token - first[start], run + stop - first[start]
        if i - start == size or wasted > 0.1 * run:
            yield start, i, first[start]
            start, wasted, run = i, 0, stop - token
    if start < len(first):
        yield start, len(first), first[start]


def _stream_after(
    model: Model, given: Exchange, place: Place, row: Tensor, token: Tensor, columns: Tensor | None
) -> Float[Tensor, "token d_model"]:
    """The stream after the place's block at some tokens, with the values put in there: no other token takes part."""
    run, (kind, layer) = given.run, place
    own, new = run.activations[place][row, token], given.values[place][row, token]
    write = written(model, place, new if columns is None else torch.where(columns, new, own), own)
    if kind in ("mlp", "block"):
        return run.stream(layer + 1)[row, token] + write
    write = run.activations["attention", layer][row, token] + write
    return after_attention(model, layer, run.stream(layer)[row, token], write)


def written(model: Model, place: Place, new: Tensor, own: Tensor) -> Float[Tensor, "*rows d_model"]:
    """The difference that a place's new values make to what its sublayer, or block, adds to the stream."""
    kind, layer = place
    if kind != "head":
        return new - own
    new, own = head_input(model, layer)(new), head_input(model, layer)(own)
    if model.architecture.attention_write != model.architecture.attention:  # Gemma: a norm after the projection
        new, own = attention_write(model, layer)(new), attention_write(model, layer)(own)
    return new - own


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
    for (kind, layer), indices in by_place(components).items():
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
