"""Editing one block of facts after another."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.stack import EditStack
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model

Editor = Callable[[Model, ParameterMask, FactSplit], WeightEdit]
ChooseMask = Callable[[Model, FactSplit], ParameterMask]


def edit_sequentially(
    model: Model,
    edit: Editor,
    steps: Sequence[tuple[ParameterMask | ChooseMask, FactSplit]],
    *,
    start: EditStack | None = None,
) -> EditStack:
    """Edit one split after another, each on the model with all earlier edits; the model itself stays as it is.

    Args:
        edit: such as `partial(edit.inject, steps=25, learning_rate=1e-3)`, called with model, mask and split.
        steps: for each edit the mask, or what chooses it on the model as it is then (from a localizer's scores, say),
            and the split, as `splits.in_sequence` makes them.
        start: edits that are there already; the result has them too.

    Raises:
        ValueError: a split that retains what an earlier one of them forgets; or what the editor refuses.

    Source: the sequential editing of Guo et al. 2024, arXiv:2410.12949 (four blocks of 16 facts).
    """
    _check_retained([split for _, split in steps])
    stack = start if start is not None else EditStack.of(model)
    with contextlib.ExitStack() as inside:
        inside.enter_context(stack.applied(model))
        for chosen, split in steps:
            made = edit(model, chosen if isinstance(chosen, ParameterMask) else chosen(model, split), split)
            stack = replace(stack, edits=(*stack.edits, made))
            stack.enter(inside, model, len(stack) - 1)
    return stack


def _check_retained(splits: Sequence[FactSplit]) -> None:
    """A later editor must not train the true answers of what an earlier one forgot."""
    forgotten: dict[tuple[str, str], int] = {}
    for number, split in enumerate(splits, start=1):
        for fact in split.retain_train:
            if earlier := forgotten.get((fact.subject, fact.relation)):
                raise ValueError(
                    f"sequential edits: split {number} retains {fact.key}, which edit {earlier} forgets; pass the "
                    "splits through splits.in_sequence first"
                )
        forgotten |= {(fact.subject, fact.relation): number for fact in split.forget}
