"""Masks finer than whole components, and masks of exactly so many entries."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import Component, ComponentScores, Kind
from mechunlearn.entries import beyond, first_entries, join, parameter_shapes
from mechunlearn.entries import n_entries as count
from mechunlearn.masks import ParameterMask, check_kinds, entry_limit, mask_of, mask_of_entries, union_of
from mechunlearn.models import Model, all_components, component_parameters, n_parts, oriented

Granularity = Literal["entry", "row", "column"]
_UNITS: Mapping[str, Kind] = {"mlp": "neuron", "attention": "head"}


def select_entries(
    model: Model,
    scores: Mapping[str, Float[Tensor, "..."]],
    *,
    budget: float | int,
    within: ParameterMask | None = None,
    granularity: Granularity = "entry",
) -> ParameterMask:
    """Select the best-scored entries of attention and MLP, or their best rows or columns.

    A row is what makes one output of a projection: its weights and, if it is scored, its bias. A column is what one
    input is multiplied by. Both are scored by the mean over their entries, so that large ones have no advantage, and
    they cost a bool each: as the model keeps its matrices, GPT-2's rows are the columns of its tensors.

    As in `select_components`, only positive scores are selected, in descending order until the next would exceed the
    budget; single entries fill it exactly while there are positive ones. Ties go by the model's order of parameters,
    then output by output (entries, rows) or input by input.

    Args:
        scores: parameter name -> one score an entry, e.g. of `localize.entry_scores`; larger is more important.
            Parameters without scores are not selected, nor are biases by columns.
        budget: a share of all attention and MLP entries (float in (0, 1]) or a number of entries (int).
        within: select among these entries only; of a row or column that is partly within, that part.

    Raises:
        ValueError: scores that do not fit the model or are not finite, nothing positive, or a budget below the best
            row's or column's size.
    """
    if granularity not in ("entry", "row", "column"):
        raise ValueError(f"granularity: got {granularity!r}, allowed: entry, row, column")
    limit = entry_limit(budget, model)
    inside = _checked(model, scores, within)
    given = {name: scores[name].detach() for name in inside}
    chosen = _best_entries(model, given, inside, limit) if granularity == "entry" else None
    return mask_of_entries(model, chosen or _best_lines(model, given, inside, limit, granularity))


def _checked(model: Model, scores: Mapping[str, Tensor], within: ParameterMask | None) -> dict[str, Tensor]:
    """Where to choose, by name in the model's order, on the scores' devices."""
    allowed = mask_of(model, all_components(model))
    for name, score in scores.items():
        if name not in allowed.shapes:
            raise ValueError(f"entry scores: got {name!r}, allowed: weights and biases of attention and MLP")
        if tuple(score.shape) != allowed.shapes[name]:
            raise ValueError(
                f"entry scores of '{name}': got shape {tuple(score.shape)}, allowed: {allowed.shapes[name]}"
            )
        if not torch.isfinite(score).all():
            raise ValueError(f"entry scores of '{name}': not finite; check the model's numerics")
    chosen = allowed.entries if within is None else within.entries
    ordered = [name for name in parameter_shapes(model) if name in scores and name in chosen]
    return {name: chosen[name].to(scores[name].device) for name in ordered}


def _best_entries(
    model: Model, scores: Mapping[str, Tensor], inside: Mapping[str, Tensor], limit: int
) -> dict[str, Tensor]:
    candidates = {name: inside[name] & (score > 0) for name, score in scores.items()}
    flat = torch.cat([torch.zeros(0), *(scores[name][where].float().cpu() for name, where in candidates.items())])
    if not len(flat):
        raise ValueError("entry scores: none is positive within the mask; choose other entries")
    n = min(limit, len(flat))
    least = flat.kthvalue(len(flat) - n + 1).values.item()
    best = {name: (where & (scores[name].float() > least)).cpu() for name, where in candidates.items()}
    ties = {name: (where & (scores[name].float() == least)).cpu() for name, where in candidates.items()}
    join(best, first_entries(model, ties, n - count(best, parameter_shapes(model))))
    return best


def _best_lines(
    model: Model, scores: Mapping[str, Tensor], inside: Mapping[str, Tensor], limit: int, granularity: Granularity
) -> dict[str, Tensor]:
    """The best rows or columns of all projections; a bias is one more entry of its row."""
    used = [name for name, score in scores.items() if score.ndim == 2 or granularity == "row"]
    totals: dict[str, Tensor] = {}
    costs: dict[str, Tensor] = {}
    for name in used:
        score, where = oriented(model, name, scores[name]), oriented(model, name, inside[name])
        axes = (int(granularity == "row"),) if score.ndim == 2 else ()
        path = name.rpartition(".")[0]
        totals[path] = totals.get(path, 0) + _sum(score * where, axes, torch.float64)
        costs[path] = costs.get(path, 0) + _sum(where.expand_as(score), axes, torch.int64)
    if not any(total.gt(0).any() for total in totals.values()):
        raise ValueError(f"entry scores: no {granularity} has a positive mean within the mask; choose other entries")
    total, cost = torch.cat(list(totals.values())), torch.cat(list(costs.values()))
    ranked = (total / cost.clamp(min=1)).argsort(descending=True, stable=True)
    ranked = ranked[total[ranked] > 0]
    taken = ranked[cost[ranked].cumsum(0) <= limit]
    if not len(taken):
        raise ValueError(
            f"budget: got {limit} entries, the best {granularity} alone has {int(cost[ranked[0]])}; raise the budget"
        )
    is_taken = torch.zeros(len(cost), dtype=torch.bool).index_fill(0, taken, True)
    lines = dict(zip(totals, is_taken.split([len(each) for each in totals.values()]), strict=True))
    chosen: dict[str, Tensor] = {}
    for name in used:
        line = lines[name.rpartition(".")[0]]
        if scores[name].ndim == 2:
            line = oriented(model, name, line[:, None] if granularity == "row" else line[None, :])
        chosen[name] = line & inside[name].cpu()
    return chosen


def _sum(values: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU, so that projections on several devices can be compared; no axes: the values themselves."""
    return (values.sum(axes, dtype=dtype) if axes else values.to(dtype)).cpu()


def select_exactly(
    scores: ComponentScores, model: Model, *, n_entries: int, kinds: Sequence[Kind] = ("mlp",)
) -> ParameterMask:
    """Select exactly so many entries by a ranking: for another localizer's, what `select_components` gave to one.

    Whole components in descending order of their scores, and the first that would exceed the number is cut: of an MLP
    whole neurons, of an attention sublayer whole heads (by their own scores where `scores` has all of them, else by
    index), and of the next neuron or head single entries: its parameters in turn, output by output (what belongs to
    no neuron or head, such as the bias of the output, comes last). In the mask's `components` are the whole components
    and the whole neurons or heads of the one that was cut; the rest of single entries is among its `parts`.

    Args:
        n_entries: such as another mask's `n_selected`.
        kinds: the kinds of component to choose among. Where the positive scores of these do not suffice, lower ones are
            taken, too.

    Raises:
        ValueError: less than one entry, or more than the scored components of these kinds have.
    """
    check_kinds(kinds)
    shapes = parameter_shapes(model)
    union: dict[str, Tensor] = {}
    chosen: list[Component] = []
    left = n_entries

    def fits(component: Component) -> bool:
        """Take a component, unless it has more entries than are left."""
        nonlocal left
        new = beyond(component_parameters(model, component), union)
        if (cost := count(new, shapes)) > left:
            return False
        if cost:
            left -= cost
            chosen.append(component)
            join(union, new)
        return True

    ranked = [component for component in scores.ranking() if component.kind in kinds]
    cut = next((component for component in ranked if not fits(component)), None)
    if n_entries < 1 or (cut is None and left):
        raise ValueError(
            f"exact selection: got {n_entries} entries, allowed: 1 to {max(n_entries - left, 0)}, as many as the "
            f"{len(ranked)} scored components of kind {' or '.join(kinds)} have"
        )
    if cut is not None and left:
        cut = next((unit for unit in _units(scores, model, cut) if not fits(unit)), cut)
        rest = first_entries(model, beyond(component_parameters(model, cut), union), left)
        return union_of(mask_of(model, chosen), mask_of_entries(model, rest))
    return mask_of(model, chosen)


def _units(scores: ComponentScores, model: Model, component: Component) -> list[Component]:
    """The neurons or heads of a component, those with higher scores first; none of a neuron or head itself."""
    if component.kind not in _UNITS:
        return []
    kind = _UNITS[component.kind]
    units = [Component(kind, component.layer, index) for index in range(n_parts(model, kind))]
    value = dict(zip(scores.components, scores.values, strict=True))
    return sorted(units, key=lambda unit: -value[unit]) if value.keys() >= set(units) else units
