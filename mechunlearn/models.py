"""Models and where their parts are; loading and saving is in checkpoints.py, the TransformerLens view in bridge.py.

Only these and architectures.py know architectures and TransformerLens. The Hugging Face model is what is trained and
edited; the bridge shares its parameters and is for looking.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from mechunlearn.architectures import (
    Architecture,
    NotSupported,
    Sizes,
    architecture_of,
    matrix_masks,
    parameter_masks,
    sizes_of,
)
from mechunlearn.components import KINDS, MATRICES, Component, Kind, Matrix
from mechunlearn.html_card import html_card
from mechunlearn.registry import did_you_mean

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "Model", "NotSupported", "all_components", "attention", "attention_write", "block", "component_parameters",
    "embedding", "final_norm", "first_output", "has_parallel_blocks", "head_input", "is_transposed",
    "matrix_parameters", "mlp", "mlp_neurons", "mlp_write", "n_parts", "oriented", "projection",
    "projection_columns", "stream_norms", "unembedding", "weight_matrices", "weights_sha256",
    "with_first_output", "wrap_model",
]  # fmt: skip


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
        """See `weights_sha256`. Computed anew each time, for weights can change."""
        return weights_sha256(self.hf)

    @cached_property
    def bridge(self) -> "TransformerBridge":
        """TransformerLens' view, sharing the parameters, built on first use; see `copied_parameters` for exceptions."""
        from mechunlearn.bridge import build_bridge

        return build_bridge(self)

    @cached_property
    def copied_parameters(self) -> tuple[str, ...]:
        """Parameters that the bridge holds copies of, by Hugging Face name.

        After changing one of these (fused QKV of GPT-NeoX), `bridge` shows the old values: use `build_bridge` again.
        """
        from mechunlearn.bridge import copied_parameters

        return copied_parameters(self, self.bridge)

    def _repr_html_(self) -> str:
        shared = f" ({self.n_kv_heads} with keys and values)" if self.n_kv_heads < self.n_heads else ""
        lines = {
            "architecture": self.architecture.name, "revision": self.revision,
            "blocks": f"{self.n_layers}, each with {self.n_heads} heads{shared} and {self.d_mlp:,} neurons",
            "width": self.d_model, "parameters": f"{sum(p.numel() for p in self.hf.parameters()):,}",
            "kept as": f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
        }  # fmt: skip
        return html_card(self.name, lines)


def weights_sha256(hf: nn.Module) -> str:
    """Hash of every parameter's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(hf.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def wrap_model(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "model") -> Model:
    """A Model around one already in memory; it is put into eval mode.

    Raises:
        NotSupported: the architecture is not supported.
    """
    architecture_of(hf.config)
    return Model(hf=hf.eval(), tokenizer=tokenizer, name=name)


def block(model: Model, layer: int) -> nn.Module:
    """The whole block; its input is resid_pre, its output resid_post."""
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer: got {layer}, allowed: 0 to {model.n_layers - 1}")
    return model.hf.get_submodule(f"{model.architecture.blocks}.{layer}")


def has_parallel_blocks(model: Model) -> bool:
    """Whether attention and MLP of a block read the same stream (GPT-NeoX): then there is no resid_mid."""
    return bool(getattr(model.hf.config, "use_parallel_residual", False))


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


def projection(model: Model, layer: int, part: Literal["query", "key", "value"]) -> nn.Module:
    """The projection that makes queries, keys or values; where they are fused, the same module for all three."""
    return block(model, layer).get_submodule(getattr(model.architecture, part))


def projection_columns(model: Model, part: Literal["query", "key", "value"], head: int) -> slice:
    """Where a head is in the output of its projection; keys and values count key-value heads."""
    n = model.n_heads if part == "query" else model.n_kv_heads
    if not 0 <= head < n:
        raise ValueError(f"{part} head: got {head}, allowed: 0 to {n - 1}")
    third = ("query", "key", "value").index(part)
    layouts = {
        "separate": head,
        "fused_blocks": third * model.n_heads + head,
        "fused_interleaved": 3 * head + third,
    }
    start = layouts[model.architecture.layout] * model.d_head
    return slice(start, start + model.d_head)


def mlp_neurons(model: Model, layer: int) -> nn.Module:
    """The MLP's down projection; its input is the neurons' activations, [batch pos d_mlp]."""
    return block(model, layer).get_submodule(model.architecture.mlp_out)


def weight_matrices(model: Model, components: Sequence[Component]) -> tuple[str, ...]:
    """The two-dimensional parameters of the components, by name, each once."""
    parameters = dict(model.hf.named_parameters())
    listed = dict.fromkeys(name for component in components for name in component_parameters(model, component))
    return tuple(name for name in listed if parameters[name].ndim == 2)


def is_transposed(model: Model, parameter: str) -> bool:
    """Whether a weight matrix is kept as [in out], as GPT-2's are, and not as [out in]."""
    return isinstance(model.hf.get_submodule(parameter.rpartition(".")[0]), Conv1D)


def oriented(model: Model, parameter: str, value: Tensor) -> Tensor:
    """A weight matrix of the model as [out in], and such a one as the model keeps it; biases as they are."""
    return value.T if value.ndim == 2 and is_transposed(model, parameter) else value


def embedding(model: Model) -> nn.Module:
    """The token embedding; its output is the first residual stream (before position embeddings, if learned)."""
    return model.hf.get_submodule(model.architecture.embedding)


def final_norm(model: Model) -> nn.Module:
    """The norm before the unembedding."""
    return model.hf.get_submodule(model.architecture.final_norm)


def stream_norms(model: Model) -> dict[str, nn.Module]:
    """Every norm that stands at the residual stream, by its path: those of the blocks and the final one."""
    architecture = model.architecture
    paths = [f"{architecture.blocks}.{layer}.{norm}" for layer in range(model.n_layers) for norm in architecture.norms]
    return {path: model.hf.get_submodule(path) for path in (*paths, architecture.final_norm)}


def unembedding(model: Model) -> nn.Module:
    """The linear map to logits (Gemma 2 caps them softly afterwards)."""
    return cast(nn.Module, model.hf.get_output_embeddings())


def first_output(output: Any) -> Tensor:
    """The tensor in a module's output, be it alone or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first_output(output: Any, tensor: Tensor) -> Any:
    """A module's output with its (first) tensor replaced: what a forward hook returns."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def n_parts(model: Model, kind: str) -> int:
    """How many components of a kind share a layer's activation: its heads or neurons; anything else is one."""
    return {"head": model.n_heads, "neuron": model.d_mlp}.get(kind, 1)


def all_components(model: Model, kinds: Sequence[Kind] = ("mlp", "attention")) -> tuple[Component, ...]:
    """Every component of the given kinds, layer by layer."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown component kind: {kind!r}.{did_you_mean(kind, KINDS)}")
    return tuple(
        Component(kind, layer, index if kind in ("head", "neuron") else None)
        for layer in range(model.n_layers)
        for kind in kinds
        for index in range(n_parts(model, kind))
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


def matrix_parameters(model: Model, layer: int, matrix: Matrix) -> dict[str, Bool[Tensor, "..."]]:
    """Which entries of which parameters make up one matrix of a layer: its weight, then its bias if there is one.

    As in `component_parameters`, masks broadcast. The matrices of a sublayer are disjoint and together all of it; a
    gate that the model does not have is empty.

    Raises:
        ValueError: an unknown matrix, or a layer the model does not have.
    """
    if matrix not in MATRICES:
        raise ValueError(f"unknown matrix: {matrix!r}.{did_you_mean(str(matrix), MATRICES)}")
    block(model, layer)
    return matrix_masks(model.hf, model.architecture, model.sizes, layer, matrix)
