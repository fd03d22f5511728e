"""Which entries of which parameters may change: ComponentScores + budget -> ParameterMask, and matched controls."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.components import KINDS, Component, ComponentScores, Kind
from mechunlearn.html_card import html_card
from mechunlearn.models import Model, all_components, component_parameters
from mechunlearn.registry import did_you_mean


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterMask:
    """The entries of the model's parameters that may change, by Hugging Face parameter name.

    Masks broadcast to the parameters' shapes, so a mask of rows or columns costs one bool each.
    """

    entries: Mapping[str, Bool[Tensor, "..."]]
    shapes: Mapping[str, tuple[int, ...]]
    components: tuple[Component, ...] = ()
    """The components the mask was made of, in order; empty if it was made otherwise."""

    def __post_init__(self) -> None:
        if self.entries.keys() != self.shapes.keys():
            raise ValueError(f"mask: got {len(self.entries)} masks and {len(self.shapes)} shapes; one of each per name")
        for name, mask in self.entries.items():
            shape = self.shapes[name]
            if mask.dtype != torch.bool or mask.ndim != len(shape) or any(
                got not in (1, allowed) for got, allowed in zip(mask.shape, shape, strict=True)
            ):  # fmt: skip
                raise ValueError(
                    f"mask of '{name}': got {mask.dtype} {tuple(mask.shape)}, allowed: bool, {shape} or 1s"
                )

    @cached_property
    def n_selected(self) -> int:
        """Exact number of parameter entries that may change."""
        return sum(_count(mask, self.shapes[name]) for name, mask in self.entries.items())

    def full(self, name: str) -> Bool[Tensor, "..."]:
        """The mask of one parameter in the parameter's shape (a view: do not write to it)."""
        return self.entries[name].expand(self.shapes[name])

    def is_whole(self, name: str) -> bool:
        """Whether every entry of this parameter may change."""
        return bool(self.entries[name].all())

    def _repr_html_(self) -> str:
        sizes = {name: _count(mask, self.shapes[name]) for name, mask in self.entries.items()}
        total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        rows = [(name, f"{n:,} of {torch.Size(self.shapes[name]).numel():,}") for name, n in list(sizes.items())[:8]]
        more = [(f"… {len(sizes) - 8} more",)] if len(sizes) > 8 else []
        lines = {"components": ", ".join(map(str, self.components)), "parameters": f"{len(sizes)}, {total:,} entries"}
        return html_card(f"{self.n_selected:,} entries may change", lines, [("parameter", "entries"), *rows, *more])


def mask_of(model: Model, components: Iterable[Component]) -> ParameterMask:
    """The mask of exactly these components; entries that two of them share are selected once."""
    ordered = tuple(sorted(set(components), key=lambda c: (c.layer, c.kind, c.index or 0)))
    union: dict[str, Tensor] = {}
    for component in ordered:
        _join(union, component_parameters(model, component))
    shapes = _shapes(model)
    return ParameterMask(entries=union, shapes={name: shapes[name] for name in union}, components=ordered)


def n_localizable(model: Model) -> int:
    """Number of entries in all attention and MLP parameters: what a budget is a share of."""
    return mask_of(model, all_components(model)).n_selected


def select_components(
    scores: ComponentScores,
    model: Model,
    *,
    budget: float | int,
    kinds: Sequence[Kind] = ("mlp",),
    fill: bool = False,
) -> ParameterMask:
    """Select the best-scored components, whole ones in descending order, until the next would exceed the budget.

    Only positive scores are selected: a negative one says that the component speaks against the fact.

    Args:
        budget: a share of all attention and MLP entries (float in (0, 1]) or a number of entries (int).
        kinds: the kinds of component to choose among.
        fill: pass over components that would exceed the budget and go on with the next, instead of stopping there.

    Raises:
        ValueError: a budget out of range, no positive score, or a budget below the best component's size (with `fill`,
            below every component's).
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown component kind: {kind!r}.{did_you_mean(kind, KINDS)}")
    limit = _limit(budget, model)
    value = dict(zip(scores.components, scores.values, strict=True))
    candidates = [c for c in scores.ranking() if c.kind in kinds and value[c] > 0]
    if not candidates:
        raise ValueError(
            f"scores of '{scores.method}': no {' or '.join(kinds)} has a positive score; choose other kinds"
        )
    shapes, union, chosen, spent = _shapes(model), {}, [], 0
    for component in candidates:
        masks = component_parameters(model, component)
        cost = sum(_count(_new(union, name, mask), shapes[name]) for name, mask in masks.items())
        if spent + cost > limit:
            if fill:
                continue
            break
        spent += cost
        chosen.append(component)
        _join(union, masks)
    if not chosen:
        best = mask_of(model, candidates[:1]).n_selected
        raise ValueError(f"budget: got {budget} ({limit} entries), the best component {candidates[0]} alone has "
                         f"{best}; raise the budget or choose smaller kinds")  # fmt: skip
    return mask_of(model, chosen)


def random_mask_like(mask: ParameterMask, model: Model, *, seed: int) -> ParameterMask:
    """Draw as many components of each kind as the mask has, uniformly over the model: the same `n_selected`.

    Heads that share keys and values are drawn as such: as many groups with as many heads in each. The draw may hit
    components of the mask itself; it is a control for where the mask is, not for what is outside it.

    Raises:
        ValueError: the mask was not made of components, or of ones that overlap so that no draw of its size is found.
    """
    if not mask.components:
        raise ValueError("random mask: the given mask lists no components; make it with mask_of or select_components")
    rng = random.Random(seed)
    for _ in range(200):
        drawn: list[Component] = []
        for kind in KINDS:
            given = [c for c in mask.components if c.kind == kind]
            if kind == "head":
                drawn += _draw_heads(given, model, rng)
            elif given:
                drawn += rng.sample(all_components(model, (kind,)), len(given))
        candidate = mask_of(model, drawn)
        if candidate.n_selected == mask.n_selected:
            return candidate
    raise ValueError("random mask: no draw of exactly the mask's size; its components overlap, use disjoint ones")


def _draw_heads(given: Sequence[Component], model: Model, rng: random.Random) -> list[Component]:
    """Draw heads with the same numbers per group of shared keys and values as the given ones."""
    size = model.n_heads // model.n_kv_heads
    occupancy = Counter((c.layer, (c.index or 0) // size) for c in given)
    groups = rng.sample(
        [(layer, g) for layer in range(model.n_layers) for g in range(model.n_kv_heads)], len(occupancy)
    )
    return [
        Component("head", layer, group * size + i)
        for (layer, group), count in zip(groups, sorted(occupancy.values()), strict=True)
        for i in rng.sample(range(size), count)
    ]


def _limit(budget: float | int, model: Model) -> int:
    if isinstance(budget, bool) or not budget > 0 or (isinstance(budget, float) and budget > 1):
        raise ValueError(f"budget: got {budget}, allowed: a share above 0 and up to 1.0, or a whole number of entries")
    if isinstance(budget, int):
        return budget
    return int(budget * n_localizable(model) + 1e-6)  # 1/3 of 3 entries is one entry, whatever floats say


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.hf.named_parameters()}


def _count(mask: Tensor, shape: tuple[int, ...]) -> int:
    """Selected entries of a parameter: each true entry of a broadcast mask stands for as many as it is repeated."""
    repeats = 1
    for size, full in zip(mask.shape, shape, strict=True):
        repeats *= full if size == 1 else 1
    return int(mask.sum()) * repeats


def _join(union: dict[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        union[name] = union[name] | mask if name in union else mask


def _new(union: Mapping[str, Tensor], name: str, mask: Tensor) -> Tensor:
    """The part of a mask that is not in the union yet."""
    return mask & ~union[name] if name in union else mask
