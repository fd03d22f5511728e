"""Loading models by name and saving them: bundled organisms, Hugging Face folders, names on the hub."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from mechunlearn.architectures import ARCHITECTURES, NotSupported, architecture_of
from mechunlearn.codebook import Codebook
from mechunlearn.codebook_model import (
    NAME,
    codebook_in,
    insert_codebook,
    load_codebook,
    save_codebook,
    without_codebook,
)
from mechunlearn.models import Model, wrap_model
from mechunlearn.registry import did_you_mean

DType = Literal["auto", "float32", "bfloat16", "float16"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def bundled_models() -> tuple[str, ...]:
    """Names of the model organisms that come with the package."""
    folder = _weights_folder()
    return tuple(sorted(p.parent.name for p in folder.glob("*/config.json"))) if folder.is_dir() else ()


def load_model(
    name_or_path: str | Path, *, device: str = "auto", dtype: DType = "auto", revision: str | None = None
) -> Model:
    """Load a bundled organism by name, a Hugging Face folder, or a model of the hub by its id.

    A folder that `save_model` wrote of a model with a codebook brings it back with the codebook in it. Only safetensors
    weights are read and no code from a checkpoint is ever run.

    Args:
        device: "auto" is CUDA if there is one, else CPU.
        dtype: "auto" is float32 on the CPU and for bundled organisms, else the checkpoint's own.
        revision: commit, branch or tag on the hub.

    Raises:
        FileNotFoundError: no such folder, an unknown name, or a folder without a checkpoint.
        ValueError: a checkpoint that is damaged or incomplete.
        NotSupported: an architecture that mechunlearn does not know.
    """
    read = read_checkpoint(
        name_or_path, AutoModelForCausalLM, architecture_of, device=device, dtype=dtype, revision=revision
    )
    model = Model(hf=read.hf, tokenizer=read.tokenizer, name=str(name_or_path), revision=read.revision)
    if read.codebook is not None:
        insert_codebook(model, *read.codebook)
    return model


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What lies in a folder or a repository of the hub."""

    hf: PreTrainedModel
    """In eval mode, still without the codebook."""
    tokenizer: PreTrainedTokenizerBase | None
    codebook: tuple[Codebook, int] | None
    """With the layer that it belongs in."""
    revision: str | None


def read_checkpoint(
    name_or_path: str | Path, kind: Any, check: Callable[[PretrainedConfig], object], *, device: str, dtype: DType,
    revision: str | None,
) -> Checkpoint:  # fmt: skip
    """What `load_model` reads; only safetensors, and no code from the checkpoint is run.

    Args:
        kind: the class of transformers that makes the model.
        check: raises where the configuration is of a model that is not wanted, before weights are read.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    where, bundled = _resolve(str(name_or_path))
    chosen = choose_device(device)
    if bundled:
        _check_sha256(Path(where))
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(name_or_path, error) from None
    check(config)
    if dtype == "auto":
        wanted: Any = torch.float32 if bundled or chosen.type == "cpu" else "auto"
    else:
        wanted = getattr(torch, dtype)
    hf = _load_weights(where, kind, config, wanted, revision).to(chosen)  # pyright: ignore[reportArgumentType]
    commit = getattr(config, "_commit_hash", None) or revision
    return Checkpoint(
        hf=hf.eval(), tokenizer=_load_tokenizer(where, revision), codebook=load_codebook(where, commit), revision=commit
    )


def model_without_weights(config: str | Path, *, dtype: DType = "auto") -> Model:
    """A model of a Hugging Face configuration on the meta device: names, shapes and sizes, no storage, no tokenizer.

    Args:
        config: its JSON file; nothing else is read, and the hub is not asked.
        dtype: "auto" is float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a configuration.
        NotSupported: an architecture that mechunlearn does not know.
    """
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration {path}; give the path of a config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (kind := data["model_type"]) not in ARCHITECTURES:  # transformers would list all that it knows
            raise NotSupported(f"{path}: architecture {kind!r} is not supported, supported: {', '.join(ARCHITECTURES)}")
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**data), dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype)
            )
    except NotSupported:
        raise
    except (KeyError, TypeError, ValueError) as error:
        told = "no model_type" if isinstance(error, KeyError) else _first_line(error)
        raise ValueError(f"{path}: not the configuration of a causal language model: {told}") from None
    return wrap_model(hf, name=path.stem)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is one, else CPU.

    Raises:
        ValueError: no such device here.
    """
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"device: got {name!r}, allowed: auto, cpu, or one that is here ({told})") from None
    return chosen


def save_model(model: Model, folder: str | Path) -> None:
    """Write a plain Hugging Face checkpoint, all or nothing; it loads without this package.

    Of a model with a codebook the checkpoint is the model around it, which is another one without: transformers would
    load that alone, `load_model` puts in the codebook that lies beside.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    write_checkpoint(model.hf, model.tokenizer, folder)


def write_checkpoint(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """What `save_model` writes, of any model of transformers: the weights, and the codebook beside them."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"cannot save a model to {folder}: it exists and is not an empty folder; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with _no_progress_bars():
            hf.save_pretrained(temporary, state_dict=without_codebook(hf.state_dict()))
        if (codebook := codebook_in(hf)) is not None:
            save_codebook(codebook, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp's own mode would hide it from everyone else, and safetensors hides weights
        for file in temporary.iterdir():
            file.chmod(0o644)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers draws one even for a checkpoint of a megabyte."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _weights_folder() -> Path:
    return Path(str(files("mechunlearn"))) / "organisms" / "weights"


def model_folder(name: str) -> Path | None:
    """The folder that `load_model` would read; None for a name on the hub."""
    where, _ = _resolve(name)
    return Path(where) if Path(where).is_dir() else None


def _resolve(name: str) -> tuple[str, bool]:
    """Where to load from, and whether it is a bundled organism."""
    bundled = bundled_models()
    if not name:
        raise FileNotFoundError(f"no model folder ''; give a folder, a hub id or a bundled model: {_known(bundled)}")
    if name in bundled:
        return str(_weights_folder() / name), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model folder {name}: no config.json in it; give a Hugging Face checkpoint folder")
        return str(path), False
    parts = name.split("/")
    if path.is_absolute() or parts[0] in (".", "..", "~") or len(parts) > 2:
        raise FileNotFoundError(
            f"no model folder {name!r}; give a folder, a hub id or a bundled model: {_known(bundled)}"
        )
    return name, False


def _known(bundled: Sequence[str]) -> str:
    return ", ".join(bundled) or "none installed"


def _cannot_load(name: str | Path, error: Exception) -> Exception:
    """One line out of transformers' many."""
    if (Path(str(name)).expanduser() / "config.json").is_file() or str(name) in bundled_models():
        return ValueError(f"cannot read the checkpoint {name}: {_first_line(error)}")
    hint = did_you_mean(str(name), bundled_models()).replace("Known:", "Bundled:")
    return FileNotFoundError(
        f"no model {str(name)!r}: not bundled, not a folder, and not available from the hub.{hint}"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_sha256(folder: Path) -> None:
    """Compare a bundled model's weights, and its codebook's if the card names them, with its card."""
    card = folder / "card.json"
    said = json.loads(card.read_text(encoding="utf-8")).get("sha256") if card.is_file() else None
    for name, expected in (said if isinstance(said, dict) else {"model.safetensors": said}).items():
        with (folder / name).open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != expected:
            raise ValueError(f"bundled model '{folder.name}': {name} has sha256 {actual[:12]}..., its card says "
                             f"{str(expected)[:12]}...; reinstall the package")  # fmt: skip


def _load_weights(where: str, kind: Any, config: PretrainedConfig, dtype: Any, revision: str | None) -> PreTrainedModel:
    try:
        with _no_progress_bars():
            loaded: Any = kind.from_pretrained(
                where, config=config, dtype=dtype, revision=revision, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights of {where}: {_first_line(error)}; needs safetensors") from None
    hf, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"checkpoint {where} is incomplete: {len(missing)} weights are missing, e.g. {missing[0]}")
    if any(name.startswith(f"{NAME}.") for name in info["unexpected_keys"]):
        raise ValueError(
            f"checkpoint {where} holds a codebook among its weights, and not where it stands; save it by save_model or "
            "save_encoder_decoder"
        )
    return hf


def _is_plain_tokenizer(folder: Path) -> bool:
    """Whether tokenizer.json says it all.

    For some families (Qwen 2) AutoTokenizer overrules such a folder and splits words by the family's own rules.
    """
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    declared = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return declared in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _load_tokenizer(where: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None for a folder that has none."""
    folder = Path(where)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        if _is_plain_tokenizer(folder):
            return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
