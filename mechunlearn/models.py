"""Models: loading and saving, where their parts are, and the TransformerLens view of them.

Only this file and architectures.py know architectures and TransformerLens. The Hugging Face model is what is trained
and edited; the bridge shares its parameters and is for looking.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from torch import Tensor, nn
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

from mechunlearn.architectures import Architecture, NotSupported, Sizes, architecture_of, parameter_masks, sizes_of
from mechunlearn.components import KINDS, Component, Kind
from mechunlearn.registry import did_you_mean

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "Model", "NotSupported", "all_components", "attention", "attention_write", "block", "build_bridge",
    "bundled_models", "component_parameters", "embedding", "final_norm", "first_output", "head_input", "load_model",
    "mlp", "mlp_neurons", "mlp_write", "save_model", "unembedding", "with_first_output", "wrap_model",
]  # fmt: skip

DType = Literal["auto", "float32", "bfloat16", "float16"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A causal language model in eval mode with its tokenizer: the one mutable thing, changed only inside a `with`."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = "model"
    revision: str | None = None

    @cached_property
    def architecture(self) -> Architecture:
        """Where this family keeps its parts."""
        return architecture_of(self.hf.config)

    @cached_property
    def sizes(self) -> Sizes:
        """All sizes at once."""
        return sizes_of(self.hf, self.architecture)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.sizes.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.sizes.d_model

    @property
    def n_heads(self) -> int:
        """Number of query heads in a layer."""
        return self.sizes.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Number of key and value heads in a layer; query head h uses number h * n_kv_heads // n_heads."""
        return self.sizes.n_kv_heads

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.sizes.d_head

    @property
    def d_mlp(self) -> int:
        """Number of neurons in an MLP."""
        return self.sizes.d_mlp

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.hf.dtype

    @property
    def sha256(self) -> str:
        """Hash of every parameter's name, type, shape and bytes. Computed anew each time, for weights can change."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.hf.named_parameters()):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            flat = parameter.detach().reshape(-1).contiguous().cpu()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def bridge(self) -> "TransformerBridge":
        """TransformerLens' view, sharing the parameters, built on first use; see `copied_parameters` for exceptions."""
        return build_bridge(self)

    @cached_property
    def copied_parameters(self) -> tuple[str, ...]:
        """Parameters that the bridge holds copies of, by Hugging Face name.

        After changing one of these (fused QKV of GPT-NeoX), `bridge` shows the old values: use `build_bridge` again.
        """
        return _copied(self, self.bridge)


def wrap_model(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "model") -> Model:
    """A Model around one already in memory; it is put into eval mode.

    Raises:
        NotSupported: the architecture is not supported.
    """
    architecture_of(hf.config)
    return Model(hf=hf.eval(), tokenizer=tokenizer, name=name)


def bundled_models() -> tuple[str, ...]:
    """Names of the model organisms that come with the package."""
    folder = _weights_folder()
    return tuple(sorted(p.parent.name for p in folder.glob("*/config.json"))) if folder.is_dir() else ()


def load_model(
    name_or_path: str | Path, *, device: str = "auto", dtype: DType = "auto", revision: str | None = None
) -> Model:
    """Load a bundled organism by name, a Hugging Face folder, or a model of the hub by its id.

    Only safetensors weights are read and no code from a checkpoint is ever run.

    Args:
        device: "auto" is CUDA if there is one, else CPU.
        dtype: "auto" is float32 on the CPU and for bundled organisms, else the checkpoint's own.
        revision: commit, branch or tag on the hub.

    Raises:
        FileNotFoundError: no such folder, an unknown name, or a folder without a checkpoint.
        ValueError: a checkpoint that is damaged or incomplete.
        NotSupported: an architecture that mechunlearn does not know.
    """
    where, bundled = _resolve(str(name_or_path))
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if bundled:
        _check_sha256(Path(where))
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(name_or_path, error) from None
    architecture_of(config)
    if dtype == "auto":
        wanted: Any = torch.float32 if bundled or chosen.type == "cpu" else "auto"
    else:
        wanted = getattr(torch, dtype)
    hf = _load_weights(where, config, wanted, revision).to(chosen)  # pyright: ignore[reportArgumentType]
    return Model(
        hf=hf.eval(),
        tokenizer=_load_tokenizer(where, revision),
        name=str(name_or_path),
        revision=getattr(config, "_commit_hash", None) or revision,
    )


def save_model(model: Model, folder: str | Path) -> None:
    """Write a plain Hugging Face checkpoint, all or nothing; it loads without this package.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"cannot save a model to {folder}: it exists and is not an empty folder; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with _no_progress_bars():
            model.hf.save_pretrained(temporary)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp's own mode would hide the checkpoint from everyone else
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def block(model: Model, layer: int) -> nn.Module:
    """The whole block; its input is resid_pre, its output resid_post."""
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer: got {layer}, allowed: 0 to {model.n_layers - 1}")
    return model.hf.get_submodule(f"{model.architecture.blocks}.{layer}")


def mlp(model: Model, layer: int) -> nn.Module:
    """The MLP sublayer."""
    return block(model, layer).get_submodule(model.architecture.mlp)


def attention(model: Model, layer: int) -> nn.Module:
    """The attention sublayer; it returns a tuple, see `first_output`."""
    return block(model, layer).get_submodule(model.architecture.attention)


def mlp_write(model: Model, layer: int) -> nn.Module:
    """The module whose output the MLP adds to the residual stream (Gemma: the norm after the MLP)."""
    return block(model, layer).get_submodule(model.architecture.mlp_write)


def attention_write(model: Model, layer: int) -> nn.Module:
    """The module whose (first) output attention adds to the residual stream (Gemma: the norm after attention)."""
    return block(model, layer).get_submodule(model.architecture.attention_write)


def head_input(model: Model, layer: int) -> nn.Module:
    """The output projection of attention; its input is z of all heads, [batch pos n_heads*d_head]."""
    return block(model, layer).get_submodule(model.architecture.output)


def mlp_neurons(model: Model, layer: int) -> nn.Module:
    """The MLP's down projection; its input is the neurons' activations, [batch pos d_mlp]."""
    return block(model, layer).get_submodule(model.architecture.mlp_out)


def embedding(model: Model) -> nn.Module:
    """The token embedding; its output is the first residual stream (before position embeddings, if learned)."""
    return model.hf.get_submodule(model.architecture.embedding)


def final_norm(model: Model) -> nn.Module:
    """The norm before the unembedding."""
    return model.hf.get_submodule(model.architecture.final_norm)


def unembedding(model: Model) -> nn.Module:
    """The linear map to logits (Gemma 2 caps them softly afterwards)."""
    return cast(nn.Module, model.hf.get_output_embeddings())


def first_output(output: Any) -> Tensor:
    """The tensor in a module's output, be it alone or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first_output(output: Any, tensor: Tensor) -> Any:
    """A module's output with its (first) tensor replaced: what a forward hook returns."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def all_components(model: Model, kinds: Sequence[Kind] = ("mlp", "attention")) -> tuple[Component, ...]:
    """Every component of the given kinds, layer by layer."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown component kind: {kind!r}.{did_you_mean(kind, KINDS)}")
    counts = {"mlp": None, "attention": None, "head": model.n_heads, "neuron": model.d_mlp}
    return tuple(
        Component(kind, layer, index)
        for layer in range(model.n_layers)
        for kind in kinds
        for index in ((None,) if counts[kind] is None else range(counts[kind]))
    )


def component_parameters(model: Model, component: Component) -> dict[str, Bool[Tensor, "..."]]:
    """Which entries of which parameters make up a component.

    Keys are names in `model.hf.named_parameters()`; the masks have the parameters' number of axes and broadcast to
    their shapes. Matrices and biases belong to components, norms to none. A head has its rows of query, key and value
    and its columns of the output projection, whose bias belongs to the sublayer only; the key and value rows of a
    group are shared by the heads of the group. A neuron has its rows (and biases) of the up and gate projection and
    its column of the down projection.

    Raises:
        ValueError: the model has no such component.
    """
    return parameter_masks(model.hf, model.architecture, model.sizes, component)


def build_bridge(model: Model) -> "TransformerBridge":
    """A fresh TransformerLens bridge whose parameters are the Hugging Face model's own.

    A shell of the same class without storage takes over the Parameter objects, so wrapping it leaves `model.hf`
    alone. Hooks, train mode and attention implementation are separate; `requires_grad` and `.grad` are shared.

    Raises:
        NotSupported: TransformerLens left a tensor of the shell empty.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import (
        build_bridge_from_module,
        detect_tokenizer_bos_eos,
    )
    from transformers.initialization import no_init_weights

    hf = model.hf
    config = copy.deepcopy(hf.config)
    config._attn_implementation = "eager"  # TransformerLens switches to it anyway where it needs attention patterns
    with torch.device("meta"), no_init_weights():
        shell = type(hf)(config)
    shell.load_state_dict(hf.state_dict(keep_vars=True), strict=False, assign=True)
    shell.tie_weights()
    for name, buffer in hf.named_buffers():
        owner, _, leaf = name.rpartition(".")
        shell.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    empty = [name for name, t in (*shell.named_parameters(), *shell.named_buffers()) if t.is_meta]
    if empty:
        raise NotSupported(
            f"no TransformerLens bridge for {model.name}: {len(empty)} tensors stay empty, e.g. {empty[0]}"
        )
    bridge = build_bridge_from_module(shell.eval(), type(hf).__name__, hf_config=config, model_name=model.name)
    if model.tokenizer is not None:
        # Given at construction, TransformerLens would reload it from its name, which one in memory does not have.
        bridge.tokenizer = copy.deepcopy(model.tokenizer)
        bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(bridge.tokenizer)
        bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos  # the same tokens as without the bridge
    return bridge


def _copied(model: Model, bridge: "TransformerBridge") -> tuple[str, ...]:
    """Hugging Face names of the parameters of which the bridge has parts in storage of its own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.hf.parameters()}
    foreign = [name for name, p in bridge.named_parameters() if p.untyped_storage().data_ptr() not in own]
    a, copied = model.architecture, set()
    for name, _ in model.hf.named_parameters():
        for path in {a.query, a.key, a.value} if a.layout != "separate" else ():
            marker = f"{a.blocks}.", f".{path}."
            if name.startswith(marker[0]) and marker[1] in name:
                copied.add(name)
    if foreign and not copied:
        raise NotSupported(f"the TransformerLens bridge of {model.name} copies {foreign[0]}; report this architecture")
    return tuple(name for name, _ in model.hf.named_parameters() if name in copied) if foreign else ()


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
    """Compare a bundled organism's weights with its card, if it has one."""
    card = folder / "card.json"
    if not card.is_file():
        return
    expected = json.loads(card.read_text(encoding="utf-8")).get("sha256")
    with (folder / "model.safetensors").open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and actual != expected:
        raise ValueError(f"bundled model '{folder.name}': model.safetensors has sha256 {actual[:12]}..., its card says "
                         f"{str(expected)[:12]}...; reinstall the package")  # fmt: skip


def _load_weights(where: str, config: PretrainedConfig, dtype: Any, revision: str | None) -> PreTrainedModel:
    try:
        with _no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, config=config, dtype=dtype, revision=revision, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights of {where}: {_first_line(error)}; needs safetensors") from None
    hf, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"checkpoint {where} is incomplete: {len(missing)} weights are missing, e.g. {missing[0]}")
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
