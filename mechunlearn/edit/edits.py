"""WeightEdit: the new values of the masked weights, applied inside a `with`, saved, loaded and exported."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.checkpoints import save_model
from mechunlearn.components import Component
from mechunlearn.edit.budget import Budget
from mechunlearn.edit.losses import Loss
from mechunlearn.edit.prefix import DEFAULT_GB
from mechunlearn.edit.training import (
    Schedule,
    Trainable,
    low_rank_trainable,
    masked_trainable,
    substituted,
    train,
)
from mechunlearn.html_card import html_card
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model
from mechunlearn.saved_records import load_record, reading, save_record

FORMAT = "mechunlearn weight edit 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightEdit:
    """New values of the masked entries of one base model (values, not differences: W + (W' - W) is not W')."""

    values: Mapping[str, Float[Tensor, " entry"]]
    """Parameter name -> the masked entries in row-major order, in the base model's dtype, on the CPU."""
    mask: ParameterMask
    base_name: str
    base_sha256: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    facts_sha256: str = ""
    """Of the facts trained on: those to forget and those to retain."""
    history: tuple[float, ...] = ()
    """Training loss of each step."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What the editor found: with a disruption budget the damage done, in nats, and the step that it ended at."""

    def __post_init__(self) -> None:
        if self.values.keys() != self.mask.entries.keys():
            odd = sorted(self.values.keys() ^ self.mask.entries.keys())[0]
            raise ValueError(f"edit '{self.method}': values and mask name different parameters, e.g. {odd}")
        for name, value in self.values.items():
            if value.shape != (selected := (_count(self.mask, name),)):
                raise ValueError(f"edit '{self.method}': {name} has {tuple(value.shape)} values, its mask {selected}")

    @property
    def comes_off(self) -> bool:
        """No: the old values are gone from the exported model."""
        return False

    @contextlib.contextmanager
    def entered(self, model: Model) -> Iterator[None]:
        """Inside, the model's masked entries have the new values; see `applied`."""
        if (found := model.sha256) != self.base_sha256:
            raise ValueError(
                f"edit '{self.method}' was made for '{self.base_name}' ({self.base_sha256[:12]}), got '{model.name}' "
                f"({found[:12]}); load that model, or make the edit anew"
            )
        parameters = dict(model.hf.named_parameters())
        edited: dict[str, Tensor] = {}
        for name, value in self.values.items():
            base = parameters[name].detach()
            edited[name] = base.masked_scatter(self.mask.full(name).to(base.device), value.to(base))
        with substituted(model, edited):
            yield

    def _repr_html_(self) -> str:
        loss = f"{self.history[0]:.3f} to {self.history[-1]:.3f} in {len(self.history)} steps" if self.history else ""
        lines = {
            "of": f"{self.base_name} ({self.base_sha256[:12]})",
            "components": self.mask.named, "entries": f"{self.mask.n_selected:,}",
            "training loss": loss, "seed": self.seed,
        }  # fmt: skip
        return html_card(f"edit: {self.method}", lines, [("option", "value"), *self.options.items()])


def _count(mask: ParameterMask, name: str) -> int:
    return int(mask.full(name).sum())


class Edit(Protocol):
    """What `applied` needs of an edit, be it of weights or of activations."""

    @property
    def method(self) -> str:
        """Name of the function that made it."""
        ...

    @property
    def comes_off(self) -> bool:
        """Whether somebody who has the edited model can take it off and has the old one, bit for bit."""
        ...

    def entered(self, model: Model) -> contextlib.AbstractContextManager[None]:
        """Inside, the model is the edited one."""
        ...


@contextlib.contextmanager
def applied(model: Model, edit: Edit) -> Iterator[None]:
    """Inside, the model is the edited one; afterwards, also on error, it is the old one bit for bit.

    Nests: an edit made on an edited model applies inside the `with` of the first, and they end in reverse order.

    Raises:
        ValueError: an edit of weights that was made for another base model (by hash of all its parameters), or a guard
            that does not fit the model.
    """
    with edit.entered(model):
        yield


def train_edit(
    model: Model,
    mask: ParameterMask,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    schedule: Schedule,
    accumulation: int,
    method: str,
    options: Mapping[str, Any],
    seed: int,
    facts_sha256: str,
    rank: int | None = None,
    prefix_cache_gb: float = DEFAULT_GB,
    checkpoint: bool = False,
    budget: Callable[[Trainable], Budget] | None = None,
) -> WeightEdit:
    """Train the masked entries on a loss and keep what they became; the model stays as it is.

    Args:
        rank: train a low-rank update of every masked matrix in place of its entries; masked biases then stay.
        prefix_cache_gb, checkpoint: as in `train`.
        budget: what makes the watch over the damage that ends the training early.
    """
    trainable = masked_trainable(model, mask) if rank is None else low_rank_trainable(model, mask, rank, seed=seed)
    watch = budget(trainable) if budget is not None and trainable.leaves else None
    history = train(
        model, trainable, loss, steps=steps, learning_rate=learning_rate, schedule=schedule,
        accumulation=accumulation, prefix_cache_gb=prefix_cache_gb, checkpoint=checkpoint, on_step=watch,
    )  # fmt: skip
    if watch is not None:
        watch.finish()
    return WeightEdit(
        values=values_in(model, mask, trainable.overrides()),
        mask=mask,
        base_name=model.name,
        base_sha256=model.sha256,
        method=method,
        options=options,
        seed=seed,
        facts_sha256=facts_sha256,
        history=history,
        notes=watch.notes() if watch is not None else {},
    )


@torch.no_grad()
def values_in(model: Model, mask: ParameterMask, tensors: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " entry"]]:
    """A WeightEdit's values: of these tensors, or else of the model's own parameters, the masked entries."""
    parameters = dict(model.hf.named_parameters())
    return {
        name: tensors.get(name, parameters[name])
        .detach()[mask.full(name).to(model.device)]
        .to("cpu", parameters[name].dtype)
        for name in mask.entries
    }


def save_edit(edit: WeightEdit, path: str | Path) -> None:
    """Write one safetensors file (values and masks) with the JSON record in its header, all or nothing."""
    record = {
        "base_name": edit.base_name,
        "base_sha256": edit.base_sha256,
        "method": edit.method,
        "options": dict(edit.options),
        "seed": edit.seed,
        "facts_sha256": edit.facts_sha256,
        "history": list(edit.history),
        "notes": dict(edit.notes),
        "components": [str(component) for component in edit.mask.components],
        "parts": list(edit.mask.parts),
        "shapes": {name: list(shape) for name, shape in edit.mask.shapes.items()},
    }
    tensors = {f"value:{name}": value for name, value in edit.values.items()}
    tensors |= {f"mask:{name}": entries for name, entries in edit.mask.entries.items()}
    save_record(path, record, tensors, form=FORMAT)


def load_edit(path: str | Path) -> WeightEdit:
    """Read what `save_edit` wrote. Whether it fits a model is checked when it is applied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a saved edit.
    """
    with reading(path, "edit"):
        record, tensors = load_record(path, form=FORMAT)
        shapes = {name: tuple(shape) for name, shape in record.pop("shapes").items()}
        mask = ParameterMask(
            entries={name: tensors[f"mask:{name}"] for name in shapes},
            shapes=shapes,
            components=tuple(map(Component.parse, record.pop("components"))),
            parts=tuple(record.pop("parts", ())),  # older files have none
        )
        values = {name: tensors[f"value:{name}"] for name in shapes}
        rest: dict[str, Any] = record | {"history": tuple(record["history"])}
        return WeightEdit(**rest, values=values, mask=mask)


def export_edit(model: Model, edit: WeightEdit, folder: str | Path) -> None:
    """Write the edited model as an ordinary Hugging Face checkpoint, which loads without this package."""
    with applied(model, edit):
        save_model(model, folder)
