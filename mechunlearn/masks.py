"""Which entries of which parameters may change: ComponentScores + budget -> ParameterMask, and masks put together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.components import KINDS, Component, ComponentScores, Kind, Matrix
from mechunlearn.entries import beyond, common, join, n_entries, parameter_shapes
from mechunlearn.html_card import html_card
from mechunlearn.models import Model, all_components, component_parameters, matrix_parameters
from mechunlearn.registry import did_you_mean


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterMask:
    """The entries of the model's parameters that may change, by Hugging Face parameter name.

    Masks broadcast to the parameters' shapes, so a mask of rows or columns costs one bool each.
    """

    entries: Mapping[str, Bool[Tensor, "..."]]
    shapes: Mapping[str, tuple[int, ...]]
    components: tuple[Component, ...] = ()
    """The components that are selected whole, in order; a neuron is a whole component, too."""
    parts: tuple[str, ...] = ()
    """What else is selected, in words: "m3.out", a whole matrix with its bias, or "m3.out (in part)"."""

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
        return n_entries(self.entries, self.shapes)

    def full(self, name: str) -> Bool[Tensor, "..."]:
        """The mask of one parameter in the parameter's shape (a view: do not write to it)."""
        return self.entries[name].expand(self.shapes[name])

    def is_whole(self, name: str) -> bool:
        """Whether every entry of this parameter may change."""
        return bool(self.entries[name].all())

    @property
    def named(self) -> str:
        """The components, then the parts."""
        return ", ".join([*map(str, self.components), *self.parts])

    def _repr_html_(self) -> str:
        sizes = {name: n_entries({name: mask}, self.shapes) for name, mask in self.entries.items()}
        total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        rows = [(name, f"{n:,} of {torch.Size(self.shapes[name]).numel():,}") for name, n in list(sizes.items())[:8]]
        more = [(f"… {len(sizes) - 8} more",)] if len(sizes) > 8 else []
        lines = {"components": self.named, "parameters": f"{len(sizes)}, {total:,} entries"}
        return html_card(f"{self.n_selected:,} entries may change", lines, [("parameter", "entries"), *rows, *more])


def mask_of(
    model: Model, components: Iterable[Component], *, matrices: Sequence[Matrix] | None = None
) -> ParameterMask:
    """The mask of exactly these components, or of some of their matrices; entries shared by two are selected once.

    Args:
        matrices: of each component only its entries in these (of an MLP: in, gate, out; of attention: q, k, v, o),
            biases included. None: all of it.

    Raises:
        ValueError: a component that the model does not have, or that has none of the matrices.
    """
    ordered = _ordered(components)
    union: dict[str, Tensor] = {}
    for component in ordered:
        masks = component_parameters(model, component)
        if matrices is not None:
            masks = _in_matrices(model, component, masks, matrices)
        join(union, masks)
    if matrices is not None:
        return mask_of_entries(model, union)
    shapes = parameter_shapes(model)
    return ParameterMask(entries=union, shapes={name: shapes[name] for name in union}, components=ordered)


def _in_matrices(
    model: Model, component: Component, masks: Mapping[str, Tensor], matrices: Sequence[Matrix]
) -> dict[str, Tensor]:
    """The entries of a component that are in these matrices."""
    wanted: dict[str, Tensor] = {}
    for matrix in matrices:
        own = matrix_parameters(model, component.layer, matrix)
        join(wanted, {name: masks[name] & mask for name, mask in own.items() if name in masks})
    if not wanted:
        has = [m for m in component.matrices if matrix_parameters(model, component.layer, m)]
        raise ValueError(
            f"mask: got matrices {', '.join(matrices) or 'none'} of {component}, allowed: {', '.join(has)}"
        )
    return wanted


def mask_of_entries(model: Model, entries: Mapping[str, Bool[Tensor, "..."]]) -> ParameterMask:
    """The mask of any entries, by parameter name: which sublayers and matrices they make up is read off them.

    Raises:
        ValueError: a parameter the model does not have, or a mask that does not fit it.
    """
    shapes = parameter_shapes(model)
    if unknown := [name for name in entries if name not in shapes]:
        raise ValueError(f"mask: got {unknown[0]!r}, allowed: parameters of '{model.name}'")
    kept = {name: mask.cpu() for name, mask in entries.items() if mask.any()}
    mask = ParameterMask(entries=kept, shapes={name: shapes[name] for name in kept})
    components: list[Component] = []
    parts: list[str] = []
    others = dict.fromkeys(kept)
    for sublayer in all_components(model):
        words, is_whole = [], True
        for matrix in sublayer.matrices:
            own = matrix_parameters(model, sublayer.layer, matrix)
            n, of = n_entries(common(kept, own), shapes), n_entries(own, shapes)
            is_whole = is_whole and n == of
            words += [f"{sublayer}.{matrix}{'' if n == of else ' (in part)'}"] if n else []
            for name in own:
                others.pop(name, None)
        if is_whole:
            components.append(sublayer)
        else:
            parts += words
    return ParameterMask(
        entries=mask.entries, shapes=mask.shapes, components=_ordered(components), parts=(*parts, *others)
    )


def union_of(*masks: ParameterMask) -> ParameterMask:
    """Every entry that one of the masks selects.

    Two parts that add up to a matrix are still called parts of it; `n_selected` is exact in any case.

    Raises:
        ValueError: masks of models with other shapes.
    """
    entries: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for mask in masks:
        for name, shape in mask.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"masks: got '{name}' of shapes {shapes[name]} and {shape}, allowed: masks of one model"
                )
        join(entries, mask.entries)
    components = _ordered(component for mask in masks for component in mask.components)
    parts = dict.fromkeys(part for mask in masks for part in mask.parts)
    whole = {*map(str, components), *(part for part in parts if " " not in part)}
    left = [p for p in parts if p.partition(".")[0] not in whole and (" " not in p or p.partition(" ")[0] not in whole)]
    return ParameterMask(entries=entries, shapes=shapes, components=components, parts=tuple(left))


def n_shared(one: ParameterMask, other: ParameterMask) -> int:
    """Number of entries that both masks select."""
    return n_entries(common(one.entries, other.entries), one.shapes)


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
    check_kinds(kinds)
    limit = entry_limit(budget, model)
    value = dict(zip(scores.components, scores.values, strict=True))
    candidates = [c for c in scores.ranking() if c.kind in kinds and value[c] > 0]
    if not candidates:
        raise ValueError(
            f"scores of '{scores.method}': no {' or '.join(kinds)} has a positive score; choose other kinds"
        )
    shapes, union, chosen, spent = parameter_shapes(model), {}, [], 0
    for component in candidates:
        masks = component_parameters(model, component)
        cost = n_entries(beyond(masks, union), shapes)
        if spent + cost > limit:
            if fill:
                continue
            break
        spent += cost
        chosen.append(component)
        join(union, masks)
    if not chosen:
        best = mask_of(model, candidates[:1]).n_selected
        raise ValueError(f"budget: got {budget} ({limit} entries), the best component {candidates[0]} alone has "
                         f"{best}; raise the budget or choose smaller kinds")  # fmt: skip
    return mask_of(model, chosen)


def check_kinds(kinds: Sequence[Kind]) -> None:
    """Raise ValueError for a kind of component that there is none of."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown component kind: {kind!r}.{did_you_mean(kind, KINDS)}")


def entry_limit(budget: float | int, model: Model) -> int:
    """The number of entries that a budget allows: a whole number of them, or a share of all that can be localized.

    Raises:
        ValueError: a budget of nothing, or a share above 1.
    """
    if isinstance(budget, bool) or not budget > 0 or (isinstance(budget, float) and budget > 1):
        raise ValueError(f"budget: got {budget}, allowed: a share above 0 and up to 1.0, or a whole number of entries")
    if isinstance(budget, int):
        return budget
    return int(budget * n_localizable(model) + 1e-6)  # 1/3 of 3 entries is one entry, whatever floats say


def _ordered(components: Iterable[Component]) -> tuple[Component, ...]:
    return tuple(sorted(set(components), key=lambda c: (c.layer, c.kind, c.index or 0)))
