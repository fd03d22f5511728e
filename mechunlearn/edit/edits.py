"""WeightEdit: the new values of the masked weights, applied inside a `with`, saved, loaded and exported."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechunlearn.checkpoints import save_model
from mechunlearn.components import Component
from mechunlearn.edit.losses import Term, weighted_sum
from mechunlearn.edit.training import Schedule, masked_trainable, substituted, train
from mechunlearn.files import whole_file
from mechunlearn.html_card import html_card
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model

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

    def __post_init__(self) -> None:
        if self.values.keys() != self.mask.entries.keys():
            odd = sorted(self.values.keys() ^ self.mask.entries.keys())[0]
            raise ValueError(f"edit '{self.method}': values and mask name different parameters, e.g. {odd}")
        for name, value in self.values.items():
            if value.shape != (selected := (_count(self.mask, name),)):
                raise ValueError(f"edit '{self.method}': {name} has {tuple(value.shape)} values, its mask {selected}")

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


@contextlib.contextmanager
def applied(model: Model, edit: WeightEdit) -> Iterator[None]:
    """Inside, the model is the edited one; afterwards, also on error, it is the old one bit for bit.

    Nests: an edit made on an edited model applies inside the `with` of the first, and they end in reverse order.

    Raises:
        ValueError: the edit was made for another base model (by hash of all its parameters).
    """
    if (found := model.sha256) != edit.base_sha256:
        raise ValueError(
            f"edit '{edit.method}' was made for '{edit.base_name}' ({edit.base_sha256[:12]}), got '{model.name}' "
            f"({found[:12]}); load that model, or make the edit anew"
        )
    parameters = dict(model.hf.named_parameters())
    edited: dict[str, Tensor] = {}
    for name, value in edit.values.items():
        base = parameters[name].detach()
        edited[name] = base.masked_scatter(edit.mask.full(name).to(base.device), value.to(base))
    with substituted(model, edited):
        yield


def train_edit(
    model: Model,
    mask: ParameterMask,
    terms: Sequence[Term],
    *,
    steps: int,
    learning_rate: float,
    schedule: Schedule,
    accumulation: int,
    method: str,
    options: Mapping[str, Any],
    seed: int,
    facts_sha256: str,
) -> WeightEdit:
    """Train the masked entries on a weighted sum of losses and keep what they became; the model stays as it is."""
    trainable = masked_trainable(model, mask)
    history = train(
        model, trainable, weighted_sum(terms),
        steps=steps, learning_rate=learning_rate, schedule=schedule, accumulation=accumulation,
    )  # fmt: skip
    dtypes = {name: parameter.dtype for name, parameter in model.hf.named_parameters()}
    return WeightEdit(
        values={name: leaf.detach().reshape(-1).to("cpu", dtypes[name]) for name, leaf in trainable.leaves.items()},
        mask=mask,
        base_name=model.name,
        base_sha256=model.sha256,
        method=method,
        options=options,
        seed=seed,
        facts_sha256=facts_sha256,
        history=history,
    )


def save_edit(edit: WeightEdit, path: str | Path) -> None:
    """Write one safetensors file (values and masks) with the JSON record in its header, all or nothing."""
    record = {
        "format": FORMAT,
        "base_name": edit.base_name,
        "base_sha256": edit.base_sha256,
        "method": edit.method,
        "options": dict(edit.options),
        "seed": edit.seed,
        "facts_sha256": edit.facts_sha256,
        "history": list(edit.history),
        "components": [str(component) for component in edit.mask.components],
        "parts": list(edit.mask.parts),
        "shapes": {name: list(shape) for name, shape in edit.mask.shapes.items()},
    }
    text = json.dumps(record, allow_nan=False, sort_keys=True)
    tensors = {f"value:{name}": value.contiguous() for name, value in edit.values.items()}
    # copies, because masks of one component share memory, which safetensors refuses
    tensors |= {f"mask:{name}": entries.cpu().contiguous().clone() for name, entries in edit.mask.entries.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"record": text})


def load_edit(path: str | Path) -> WeightEdit:
    """Read what `save_edit` wrote. Whether it fits a model is checked when it is applied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a saved edit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no edit file at {path}; write one with save_edit")
    try:
        with safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if record.pop("format") != FORMAT:
            raise ValueError("another format")
        shapes = {name: tuple(shape) for name, shape in record.pop("shapes").items()}
        mask = ParameterMask(
            entries={name: tensors[f"mask:{name}"] for name in shapes},
            shapes=shapes,
            components=tuple(map(Component.parse, record.pop("components"))),
            parts=tuple(record.pop("parts", ())),  # older files have none
        )
        values = {name: tensors[f"value:{name}"] for name in shapes}
        return WeightEdit(**record | {"history": tuple(record["history"])}, values=values, mask=mask)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a saved edit ({type(error).__name__}: {reason}); save it anew") from None


def export_edit(model: Model, edit: WeightEdit, folder: str | Path) -> None:
    """Write the edited model as an ordinary Hugging Face checkpoint, which loads without this package."""
    with applied(model, edit):
        save_model(model, folder)
