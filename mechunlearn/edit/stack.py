"""EditStack: edits made one after another, undone from the end, merged into one."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.checkpoints import save_model
from mechunlearn.edit.edits import WeightEdit, applied
from mechunlearn.html_card import html_card
from mechunlearn.masks import ParameterMask, union_of
from mechunlearn.models import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class EditStack:
    """Edits of one base model, each made on the model with all earlier ones applied."""

    base_name: str
    base_sha256: str
    edits: tuple[WeightEdit, ...] = ()

    def __post_init__(self) -> None:
        if self.edits and (first := self.edits[0]).base_sha256 != self.base_sha256:
            raise ValueError(
                f"stack: got a first edit '{first.method}' made on '{first.base_name}' ({first.base_sha256[:12]}), "
                f"allowed: one made on '{self.base_name}' ({self.base_sha256[:12]})"
            )

    @classmethod
    def of(cls, model: Model) -> "EditStack":
        """The stack of no edits of a model."""
        return cls(base_name=model.name, base_sha256=model.sha256)

    def __len__(self) -> int:
        return len(self.edits)

    @contextlib.contextmanager
    def applied(self, model: Model, n: int | None = None) -> Iterator[None]:
        """Inside, the model has the first n edits (None: all); afterwards, also on error, it is as before bit for bit.

        Raises:
            ValueError: another base model, an edit that was not made on top of those before it, or n out of range.
        """
        if n is not None and not 0 <= n <= len(self):
            raise ValueError(f"stack: got n = {n}, allowed: 0 to {len(self)}, its number of edits")
        with contextlib.ExitStack() as inside:
            for number in range(len(self) if n is None else n):
                self.enter(inside, model, number)
            yield

    def enter(self, inside: contextlib.ExitStack, model: Model, number: int) -> None:
        """Apply one edit, counted from 0, on top of those before it, until `inside` is left.

        Raises:
            ValueError: the model is not what the edit was made on.
        """
        try:
            inside.enter_context(applied(model, self.edits[number]))
        except ValueError as error:
            raise ValueError(f"stack: edit {number + 1} of {len(self)} does not fit its place: {error}") from None

    def push(self, model: Model, edit: WeightEdit) -> "EditStack":
        """The stack with one more edit: one that was made inside `with stack.applied(model)`.

        Raises:
            ValueError: an edit that was made on something else, or a stack of another model.
        """
        with self.applied(model):
            found = model.sha256
        if found != edit.base_sha256:
            raise ValueError(
                f"stack: got edit '{edit.method}' made on '{edit.base_name}' ({edit.base_sha256[:12]}), allowed: one "
                f"made on '{model.name}' with the {len(self)} edits of the stack applied ({found[:12]})"
            )
        return replace(self, edits=(*self.edits, edit))

    def undo(self, n: int = 1) -> "EditStack":
        """The stack without its last n edits.

        Raises:
            ValueError: more than there are.
        """
        if not 0 <= n <= len(self):
            raise ValueError(f"stack: got {n} edits to undo, allowed: 0 to {len(self)}, its number of edits")
        return replace(self, edits=self.edits[: len(self) - n])

    def merge(self) -> WeightEdit:
        """One edit of the base model that gives, bit for bit, what the whole stack gives.

        Its mask is the union of the masks and its values are the last ones; its losses are those of all edits in turn.
        """
        mask = union_of(*(edit.mask for edit in self.edits))
        keys = ("method", "options", "seed", "facts_sha256", "base_sha256", "notes")
        return WeightEdit(
            values={name: self._final(name, mask) for name in mask.entries},
            mask=mask,
            base_name=self.base_name,
            base_sha256=self.base_sha256,
            method="stack",
            options={"edits": [{key: _plain(getattr(edit, key)) for key in keys} for edit in self.edits]},
            history=tuple(loss for edit in self.edits for loss in edit.history),
        )

    def _final(self, name: str, mask: ParameterMask) -> Float[Tensor, " entry"]:
        """The last value of each entry of a parameter that an edit changed."""
        changed = [edit for edit in self.edits if name in edit.values]
        values = torch.zeros(mask.shapes[name], dtype=changed[0].values[name].dtype)
        for edit in changed:
            values.masked_scatter_(edit.mask.full(name), edit.values[name])
        return values[mask.full(name)]

    def export(self, model: Model, folder: str | Path) -> None:
        """Write the model with all edits as an ordinary Hugging Face checkpoint, which loads without this package."""
        with self.applied(model):  # in turn and not merged, so that an edit that does not fit is found
            save_model(model, folder)

    def _repr_html_(self) -> str:
        head = ("edit", "method", "components", "entries", "seed")
        rows = [(i + 1, e.method, e.mask.named, f"{e.mask.n_selected:,}", e.seed) for i, e in enumerate(self.edits)]
        lines = {"of": f"{self.base_name} ({self.base_sha256[:12]})"}
        return html_card(f"{len(self)} edits, one after another", lines, [head, *rows])


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
