"""Guard: an edit of activations that clamps chosen features of a dictionary where a gate says so; weights stay."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechunlearn.features.attached import Seen, TokenChange, attached
from mechunlearn.features.clamp import Clamp
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.gate import Gate
from mechunlearn.features.hook_points import place_of_hook
from mechunlearn.features.quality import check_fits
from mechunlearn.html_card import html_card
from mechunlearn.models import Model, wrap_model
from mechunlearn.saved_records import load_record, reading, save_record

NAME = "guard.safetensors"
"""Of a guard's file in a folder that the command line wrote."""
FORMAT = "mechunlearn guard 2"  # shares, and strengths under scaling, meant something else in the first


@dataclass(frozen=True, kw_only=True, eq=False)
class Guard:
    """Where a text is about what is to be forgotten, its features get other values; without it the model is as before.

    x' = x + decode(clamped f) - decode(f): what the dictionary does not explain of x stays, and where nothing is
    clamped x stays bit for bit.

    Source: Muhamed et al. 2025, arXiv:2504.08192, section 3.
    """

    dictionary: Dictionary
    """Of the chosen features alone, but for topk ones."""
    features: tuple[int, ...]
    """Their numbers in the whole dictionary."""
    gate: Gate | None
    """None: open everywhere (a static clamp)."""
    clamp: Clamp | None
    """None: nothing is changed (a gate alone, for measuring)."""
    base_name: str
    base_sha256: str
    """The model that it was made on; it may be put on others of the same shape, such as tuned ones."""
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    facts_sha256: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError(f"guard '{self.method}': got no features, allowed: one or more")
        if self.clamp is not None and self.clamp.mode == "mean" and len(self.clamp.means) != len(self.features):
            raise ValueError(
                f"guard '{self.method}': got {len(self.clamp.means)} means for {len(self.features)} features"
            )

    @property
    def comes_off(self) -> bool:
        """Yes: no weight is changed."""
        return True

    @contextmanager
    def entered(self, model: Model) -> Iterator[None]:
        """Inside, the guard acts on every forward pass, with or without a cache of keys and values; see `applied`."""
        check_fits(model, self.dictionary)
        with attached(model, place_of_hook(model, self.dictionary.hook_point), self.change(model.device)):
            yield

    def change(self, device: torch.device | str) -> TokenChange:
        """What the guard does to the activation."""
        dictionary = self.dictionary.to(device)
        at = torch.tensor(self.places, device=device)

        def guard(x: Tensor, seen: Seen) -> Tensor:
            features = dictionary.encode(x)
            chosen = features[..., at]
            on = (chosen > 0).any(-1) & seen.content
            hot = on if self.gate is None else on & self.gate.is_open(on, seen.content, seen.memory)
            if self.clamp is None:
                return x
            clamped = features.index_copy(-1, at, self.clamp(chosen, hot, dictionary.scale_of(x)))
            step = dictionary.decode(clamped, like=x) - dictionary.decode(features, like=x)
            return torch.where(hot[..., None], x + step.to(x.dtype), x)

        return guard

    @property
    def places(self) -> tuple[int, ...]:
        """Where the chosen features are in `dictionary`."""
        return self.features if self.dictionary.kind == "topk" else tuple(range(len(self.features)))

    def _repr_html_(self) -> str:
        gate = f"{self.gate.kind} above {self.gate.threshold:.3g}, by {self.gate.scope}" if self.gate else "always open"
        lines = {
            "at": f"{self.dictionary.hook_point} of {self.base_name}", "features": len(self.features), "gate": gate,
            "clamp": f"{self.clamp.mode}, {self.clamp.strength:g} {self.clamp.units}" if self.clamp else "none",
        }  # fmt: skip
        return html_card(f"guard: {self.method}", lines, [("option", "value"), *self.options.items()])


def narrowed(dictionary: Dictionary, features: Sequence[int]) -> Dictionary:
    """What a guard keeps of a dictionary: the features alone; of a topk one everything."""
    return dictionary if dictionary.kind == "topk" else dictionary.only(features)


def attach(guard: Guard, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[], None]:
    """Put a guard on a plain transformers model, as when serving it; call what comes back to take it off.

    It stays on as long as the model lives, whether that is kept or not.
    """
    handles = ExitStack()
    handles.enter_context(guard.entered(wrap_model(hf, tokenizer)))

    def keep(_module: Any, _inputs: Any, _kept: ExitStack = handles) -> None:
        """Without it nothing would hold the guard once `attach` has returned."""

    handles.callback(hf.register_forward_pre_hook(keep).remove)
    return handles.close


def save_guard(guard: Guard, path: str | Path) -> None:
    """Write one safetensors file (the dictionary's tensors) with the JSON record in its header, all or nothing."""
    dictionary = {name: value for name, value in vars(guard.dictionary).items() if name != "weights"}
    record = {name: value for name, value in vars(guard).items() if name not in ("dictionary", "gate", "clamp")}
    record |= {"dictionary": dictionary, "gate": guard.gate and asdict(guard.gate)}
    record |= {"clamp": guard.clamp and asdict(guard.clamp)}
    save_record(path, record, guard.dictionary.weights, form=FORMAT)


def load_guard(path: str | Path) -> Guard:
    """Read what `save_guard` wrote, or the guard in a folder of the command line's.

    Whether it fits a model is checked when it is applied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a saved guard.
    """
    path = Path(path) / NAME if Path(path).is_dir() else path
    with reading(path, "guard"):
        record, weights = load_record(path, form=FORMAT)
        gate, clamp, dictionary = (record.pop(name) for name in ("gate", "clamp", "dictionary"))
        rest: dict[str, Any] = record | {"features": tuple(record["features"])}
        return Guard(
            **rest,
            dictionary=Dictionary(weights=weights, **dictionary),
            gate=gate and Gate(**gate | {"rates": tuple(gate["rates"])}),
            clamp=clamp and Clamp(**clamp | {"means": tuple(clamp["means"])}),
        )


def without_clamp(guard: Guard) -> Guard:
    """A control: the gate decides, and nothing is changed."""
    return replace(guard, clamp=None, method=f"{guard.method}, gate alone")
