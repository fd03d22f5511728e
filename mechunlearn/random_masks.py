"""Random controls: masks of the same make and exactly the same size as a given one, drawn anew."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mechunlearn.components import KINDS, MATRICES, Component, Kind, Matrix
from mechunlearn.entries import Entries, beyond, first_entries, join, parameter_shapes
from mechunlearn.entries import n_entries as count
from mechunlearn.masks import ParameterMask, mask_of, mask_of_entries, n_localizable, union_of
from mechunlearn.matrix_patterns import draw, seen_in
from mechunlearn.models import Model, all_components, matrix_parameters

Matched = Literal["size", "depth"]


def random_mask_like(
    mask: ParameterMask, model: Model, *, seed: int, matched: Matched = "size", exclude: bool = False
) -> ParameterMask:
    """Draw a mask of the same make and exactly the same `n_selected`, uniformly over the model.

    As many components of each kind as the mask has; heads that share keys and values are drawn as such: as many groups
    with as many heads in each. Of what is in no whole component, as many matrices of each type (q, out, ...) with as
    many of their outputs, inputs, single weights and biases in each: their layers are drawn, and then which of them.

    Args:
        matched: "size" draws from all layers; "depth" from each third of the layers what the mask has there.
        exclude: draw outside of the mask, so that no entry is in both. Otherwise the draw may hit the mask itself: it
            is a control for where the mask is, not for what is outside it.

    Raises:
        ValueError: the mask selects nothing, or norms or embeddings; or the model (the third of it, what is outside of
            the mask) has not enough of what is to be drawn.

    Differs from the source: Guo et al. 2024 (arXiv:2410.12949) drew without a seed and without regard to depth, and
        often drew layers of the localized set itself.
    """
    if not mask.n_selected:
        raise ValueError("random mask: the given mask selects nothing; give one with at least one component or entry")
    if matched not in ("size", "depth"):
        raise ValueError(f"random mask: got matched {matched!r}, allowed: size, depth")
    rng, n = random.Random(seed), model.n_layers
    thirds = [[layer for layer in range(n) if matched == "size" or 3 * layer // n == i] for i in range(3)]
    strata = thirds[:1] if matched == "size" else thirds
    taken = dict(mask.entries) if exclude else {}
    whole = _outermost(mask.components)
    drawn: list[Component] = []
    for kind in KINDS:  # sublayers first, so that neurons and heads are drawn beside them
        for layers in strata:
            given = [c for c in whole if c.kind == kind and c.layer in layers]
            pick = _draw_heads if kind == "head" else _draw_components
            new = pick(given, model, layers, taken, rng) if given else []
            drawn += new
            join(taken, mask_of(model, new).entries)
    control = mask_of(model, drawn)
    rest = beyond(mask.entries, mask_of(model, whole).entries)
    if count(rest, mask.shapes):
        control = union_of(control, _draw_entries(rest, model, strata, taken, rng))
    if control.n_selected != mask.n_selected:
        raise ValueError(
            f"random mask: drew {control.n_selected} of {mask.n_selected} entries; the mask must hold all of the "
            "components that it lists, and no norms or embeddings"
        )
    return control


def random_matrices(model: Model, n_entries: int, seed: int) -> ParameterMask:
    """Draw whole single matrices of attention and MLP (with their biases), and cut the last to exactly `n_entries`.

    Of the last matrix the first weights are taken, output by output, and then biases.

    Raises:
        ValueError: less than one entry, or more than there are.

    Differs from the source: the control `random` of Guo et al. 2024 (arXiv:2410.12949) was unseeded, overshot the
        budget, and never drew a gate.
    """
    most = n_localizable(model)
    if not 1 <= n_entries <= most:
        raise ValueError(f"random matrices: got {n_entries} entries, allowed: 1 to {most}")
    matrices: list[tuple[int, Matrix]] = [(layer, matrix) for layer in range(model.n_layers) for matrix in MATRICES]
    random.Random(seed).shuffle(matrices)
    shapes, union = parameter_shapes(model), dict[str, Tensor]()
    while left := n_entries - count(union, shapes):
        join(union, first_entries(model, matrix_parameters(model, *matrices.pop()), left))
    return mask_of_entries(model, union)


def _outermost(components: Sequence[Component]) -> list[Component]:
    """Without the neurons and heads of sublayers that are there as a whole."""
    whole = {(c.layer, c.kind) for c in components}
    return [c for c in components if (c.layer, {"neuron": "mlp", "head": "attention"}.get(c.kind)) not in whole]


def _draw_components(
    given: Sequence[Component], model: Model, layers: Sequence[int], taken: Entries, rng: random.Random
) -> list[Component]:
    """As many of one kind as are given, among those without a taken entry."""
    kind = given[0].kind
    free = {layer: _free_units(model, kind, layer, taken) for layer in layers}
    pool = [c for c in all_components(model, (kind,)) if c.layer in free and free[c.layer][c.index or 0]]
    return rng.sample(pool, _enough(len(given), len(pool), f"components of kind {kind}", layers))


def _draw_heads(
    given: Sequence[Component], model: Model, layers: Sequence[int], taken: Entries, rng: random.Random
) -> list[Component]:
    """Heads with the same numbers per group of shared keys and values as the given, in groups without taken entries."""
    size = model.n_heads // model.n_kv_heads
    occupancy = Counter((c.layer, (c.index or 0) // size) for c in given)
    pool = [
        (layer, group)
        for layer in layers
        for group, free in enumerate(_free_units(model, "head", layer, taken))
        if free
    ]
    groups = rng.sample(pool, _enough(len(occupancy), len(pool), "groups of heads", layers))
    return [
        Component("head", layer, group * size + i)
        for (layer, group), n in zip(groups, sorted(occupancy.values()), strict=True)
        for i in rng.sample(range(size), n)
    ]


def _free_units(model: Model, kind: Kind, layer: int, taken: Entries) -> list[bool]:
    """Which neurons, which groups of heads, or whether the whole sublayer of a layer, hold no taken entry."""
    n = {"neuron": model.d_mlp, "head": model.n_kv_heads}.get(kind, 1)
    hit = torch.zeros(n, dtype=torch.bool)
    for matrix in Component("mlp" if kind in ("mlp", "neuron") else "attention", layer).matrices:
        if (seen := seen_in(model, taken, layer, matrix)) is None:
            continue
        if matrix in ("out", "o"):  # units are what enters; the bias belongs to none of them, only to the sublayer
            units = seen.weights.any(0).expand(seen.shape[1])
            hit |= seen.biases.any() & (n == 1)
        else:
            units = seen.weights.any(1).expand(seen.shape[0])
            units = units | seen.biases if len(seen.biases) else units
        hit |= units.reshape(n, -1).any(1)
    return (~hit).tolist()


def _draw_entries(
    entries: Entries, model: Model, strata: Sequence[Sequence[int]], taken: Entries, rng: random.Random
) -> ParameterMask:
    """As many matrices of each type as the entries are in, with as many of the same kind of entries in each."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    union: dict[str, Tensor] = {}
    for matrix in MATRICES:
        for layers in strata:
            given = [seen for layer in layers if (seen := seen_in(model, entries, layer, matrix))]
            patterns = [pattern for seen in given if (pattern := seen.pattern())]
            room = {layer: seen for layer in layers if (seen := seen_in(model, taken, layer, matrix))}
            # the largest first: where it has room, smaller ones have it too, so a choice spoils no later one
            for pattern in sorted(patterns, key=lambda p: (-p.n_weights, -p.n_biases)):
                open_layers = [layer for layer, seen in room.items() if seen.has_room(pattern)]
                what = f"matrices '{matrix}' with {pattern.n} free {pattern.of}"
                _enough(1, len(open_layers), what, layers)
                layer = rng.choice(open_layers)
                join(union, draw(model, layer, matrix, pattern, room.pop(layer), generator))
    return mask_of_entries(model, union)


def _enough(wanted: int, there: int, what: str, layers: Sequence[int]) -> int:
    if there < wanted:
        raise ValueError(
            f"random mask: wanted {wanted} (more) {what}, but in layers {layers[0]} to {layers[-1]} {there} are left; "
            "make the mask smaller, or draw with matched='size' and exclude=False"
        )
    return wanted
