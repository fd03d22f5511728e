"""Models with a codebook in them: put in for good, saved beside the weights, loaded with them."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechunlearn.activations import attach_between
from mechunlearn.codebook import Codebook, CodebookShape
from mechunlearn.files import whole_file
from mechunlearn.models import Model, NotSupported, block, first_output, has_parallel_blocks, with_first_output

NAME = "codebook"
"""Of the submodule; its tensors are `codebook.codes` and so on."""
TENSORS, SETTINGS = "codebook.safetensors", "codebook.json"


def codebook_in(hf: nn.Module) -> Codebook | None:
    """The codebook of a model that has one."""
    found = hf._modules.get(NAME)
    return found if isinstance(found, Codebook) else None


def codebook_of(model: Model | PreTrainedModel) -> Codebook:
    """The codebook of a model, or of a plain transformers model.

    Raises:
        ValueError: it has none.
    """
    hf = model.hf if isinstance(model, Model) else model
    if (found := codebook_in(hf)) is None:
        raise ValueError(f"{name_of(model)} has no codebook; train one into it, or load a model that has one")
    return found


def name_of(model: Model | PreTrainedModel) -> str:
    """What a model is called: where it was loaded from, or its class."""
    return model.name if isinstance(model, Model) else model.name_or_path or type(model).__name__


def insert_codebook(model: Model, codebook: Codebook, layer: int) -> None:
    """From now on the stream after a layer's attention, residual sum included, goes on as the codebook passes it.

    Nothing leaks past: the residual sum of the block is made again from what the codebook returns. In models whose
    attention and MLP read the same stream, which have none between them, it is the stream after the block.

    Raises:
        ValueError: a layer that the model does not have, another width, or a model that has a codebook already.
    """
    stands_in = block(model, layer)
    _own(model.hf, codebook, model.d_model, layer)
    if has_parallel_blocks(model):
        _behind(stands_in, codebook)
    else:
        attach_between(model, layer, lambda _place, stream: codebook(stream))


def insert_in_encoder(hf: PreTrainedModel, codebook: Codebook, layer: int) -> None:
    """The same in the encoder of an encoder-decoder model (T5), whose sublayers return their residual sums.

    Raises:
        NotSupported: an architecture whose encoder is kept otherwise.
        ValueError: as `insert_codebook`.
    """
    try:
        sublayer = hf.get_submodule(f"encoder.block.{layer}.layer.0")
    except AttributeError:
        raise NotSupported(
            f"codebook: {type(hf).__name__} has no encoder.block.{layer}.layer.0; give a T5 and a layer of its encoder"
        ) from None
    _own(hf, codebook, int(hf.config.d_model), layer)
    _behind(sublayer, codebook)


def _behind(module: nn.Module, codebook: Codebook) -> None:
    """What the module returns goes on as the codebook passes it."""

    def on_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return with_first_output(output, codebook(first_output(output)))

    module.register_forward_hook(on_output)


def _own(hf: PreTrainedModel, codebook: Codebook, width: int, layer: int) -> None:
    if codebook_in(hf) is not None:
        raise ValueError("codebook: the model has one already; start from one without, or load it anew")
    if codebook.shape.d_model != width:
        raise ValueError(f"codebook: made for a width of {codebook.shape.d_model}, the model has {width}")
    codebook.layer = layer
    hf.add_module(NAME, codebook.to(hf.device, hf.dtype))


def without_codebook(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model that are not its codebook's."""
    return {name: value for name, value in state.items() if not name.startswith(f"{NAME}.")}


def save_codebook(codebook: Codebook, folder: Path) -> None:
    """Write the tensors, deletions included, and the settings into a model's folder."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in codebook.state_dict().items()}
    with whole_file(folder / TENSORS) as partial:
        save_file(tensors, partial)
    with whole_file(folder / SETTINGS) as partial:
        text = json.dumps({"layer": codebook.layer, **codebook.settings()}, indent=1) + "\n"
        partial.write_text(text, encoding="utf-8")


def load_codebook(where: str | Path, revision: str | None = None) -> tuple[Codebook, int] | None:
    """The codebook in a model's folder or in its repository on the hub, and its layer; None if there is none.

    Raises:
        ValueError: one that is damaged.
    """
    if (found := _beside(where, SETTINGS, revision)) is None:
        return None
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
        layer = int(settings.pop("layer"))
        made = Codebook(CodebookShape(**settings))
        if (tensors := _beside(where, TENSORS, revision)) is None:
            raise ValueError(f"no {TENSORS} in it")
        made.load_state_dict(load_file(tensors))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{where}: cannot read its codebook: {str(error).splitlines()[0]}") from None
    return made, layer


def _beside(where: str | Path, name: str, revision: str | None) -> Path | None:
    """A file of a checkpoint; None if there is none, or if it cannot be had offline."""
    if Path(where).is_dir():
        return Path(where) / name if (Path(where) / name).is_file() else None
    try:
        return Path(hf_hub_download(str(where), name, revision=revision))
    except EntryNotFoundError:
        return None
