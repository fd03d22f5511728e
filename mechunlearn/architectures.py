"""Where each supported architecture keeps its parts: module paths, and how heads lie in the attention matrices.

Everything here follows from the configuration and the module tree; models.py is the way in for the rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mechunlearn.components import Component, Matrix


class NotSupported(ValueError):
    """This method cannot handle this model, because ..."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Module paths of one family; those after `blocks` are relative to a block."""

    name: str
    blocks: str
    embedding: str
    final_norm: str
    mlp: str = "mlp"
    attention: str
    mlp_in: tuple[str, ...]
    """Projections whose output entries are neurons (gate and up where gated)."""
    mlp_out: str
    query: str
    key: str
    value: str
    """Query, key and value projections; the same path three times where they are fused."""
    output: str
    attention_norm: str
    """The norm through which attention reads the residual stream."""
    mlp_norm: str
    mlp_write: str = "mlp"
    attention_write: str
    layout: Literal["separate", "fused_blocks", "fused_interleaved"] = "separate"
    """fused_blocks: [all q | all k | all v] (GPT-2); fused_interleaved: [q k v] head by head (NeoX)."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of the attention's matrices, each once."""
        return tuple(dict.fromkeys((self.query, self.key, self.value, self.output)))

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of a block's norms: those that read the stream, and those that write to it where there are such."""
        after = (self.mlp_write,) if self.mlp_write != self.mlp else ()
        after += (self.attention_write,) if self.attention_write != self.attention else ()
        return (self.attention_norm, self.mlp_norm, *after)


def _llama_like(name: str, *, post_norms: bool = False) -> Architecture:
    return Architecture(
        name=name,
        blocks="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        attention="self_attn",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        attention_norm="input_layernorm",
        mlp_norm="pre_feedforward_layernorm" if post_norms else "post_attention_layernorm",
        mlp_write="post_feedforward_layernorm" if post_norms else "mlp",
        attention_write="post_attention_layernorm" if post_norms else "self_attn",
    )


_ALL = (
    Architecture(
        name="gpt2",
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention="attn",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        attention_write="attn",
        layout="fused_blocks",
    ),
    Architecture(
        name="gpt_neo",
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention="attn",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        output="attn.attention.out_proj",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        attention_write="attn",
    ),
    Architecture(
        name="gpt_neox",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        output="attention.dense",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        attention_write="attention",
        layout="fused_interleaved",
    ),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma"),
    _llama_like("gemma2", post_norms=True),
    _llama_like("gemma3_text", post_norms=True),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The table entry for a model's configuration.

    Raises:
        NotSupported: the family is not in the table, or the configuration uses a part of it that we do not map.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        advice = "; load its text-only checkpoint (gemma3_text)" if kind == "gemma3" else ""
        if getattr(config, "is_encoder_decoder", False):
            advice = "; for codebooks load_encoder_decoder takes it"
        raise NotSupported(f"architecture {kind!r} is not supported, supported: {', '.join(ARCHITECTURES)}{advice}")
    if getattr(config, "add_cross_attention", False):
        raise NotSupported(f"architecture {kind!r} with cross-attention is not supported; use a decoder-only model")
    return ARCHITECTURES[kind]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a model that masks and hooks need."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int


def sizes_of(hf: PreTrainedModel, architecture: Architecture) -> Sizes:
    """Read the sizes from the configuration and the first block's matrices, never from a table."""
    config = hf.config
    n_heads = int(config.num_attention_heads)
    block = hf.get_submodule(architecture.blocks + ".0")
    n_in, _ = _in_out(block.get_submodule(architecture.output))
    return Sizes(
        n_layers=int(config.num_hidden_layers),
        d_model=int(config.hidden_size),
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        d_head=n_in // n_heads,
        d_mlp=_in_out(block.get_submodule(architecture.mlp_out))[0],
    )


def parameter_masks(
    hf: PreTrainedModel, architecture: Architecture, sizes: Sizes, component: Component
) -> dict[str, Bool[Tensor, "..."]]:
    """Which entries of which parameters make up a component, as masks that broadcast to the parameters' shapes."""
    layer, index = component.layer, component.index
    bound = {"head": sizes.n_heads, "neuron": sizes.d_mlp}.get(component.kind)
    if layer >= sizes.n_layers or (index is not None and bound is not None and index >= bound):
        has = f"{sizes.n_layers} layers, {sizes.n_heads} heads, {sizes.d_mlp} neurons each"
        raise ValueError(f"component {component}: the model has {has}; count from 0")
    masks: dict[str, Tensor] = {}

    def select(paths: Iterable[str], *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        for path in dict.fromkeys(paths):
            module = hf.get_submodule(f"{architecture.blocks}.{layer}.{path}")
            for name, mask in _module_masks(module, outputs, inputs).items():
                masks[f"{architecture.blocks}.{layer}.{path}.{name}"] = mask

    if component.kind == "mlp":
        select((*architecture.mlp_in, architecture.mlp_out))
    elif component.kind == "attention":
        select(architecture.projections)
    elif component.kind == "neuron":
        neuron = torch.arange(sizes.d_mlp) == index
        select(architecture.mlp_in, outputs=neuron)
        select((architecture.mlp_out,), inputs=neuron)
    else:
        head = torch.arange(sizes.n_heads) == index
        group = torch.arange(sizes.n_kv_heads) == (index or 0) * sizes.n_kv_heads // sizes.n_heads
        if architecture.layout == "separate":
            select((architecture.query,), outputs=head.repeat_interleave(sizes.d_head))
            select((architecture.key, architecture.value), outputs=group.repeat_interleave(sizes.d_head))
        elif architecture.layout == "fused_blocks":
            select((architecture.query,), outputs=head.repeat_interleave(sizes.d_head).repeat(3))
        else:
            select((architecture.query,), outputs=head.repeat_interleave(3 * sizes.d_head))
        select((architecture.output,), inputs=head.repeat_interleave(sizes.d_head))
    return masks


def matrix_masks(
    hf: PreTrainedModel, architecture: Architecture, sizes: Sizes, layer: int, matrix: Matrix
) -> dict[str, Bool[Tensor, "..."]]:
    """Which entries of which parameters make up one matrix of a layer, weight, then bias; none for a missing gate."""
    paths = {
        "in": architecture.mlp_in[-1],
        "gate": architecture.mlp_in[0] if len(architecture.mlp_in) > 1 else None,
        "out": architecture.mlp_out,
        "q": architecture.query,
        "k": architecture.key,
        "v": architecture.value,
        "o": architecture.output,
    }
    if (path := paths[matrix]) is None:
        return {}
    outputs = None
    if architecture.layout != "separate" and matrix in ("q", "k", "v"):
        third = torch.arange(3) == ("q", "k", "v").index(matrix)
        if architecture.layout == "fused_blocks":
            outputs = third.repeat_interleave(sizes.n_heads * sizes.d_head)
        else:
            outputs = third.repeat_interleave(sizes.d_head).repeat(sizes.n_heads)
    whole = f"{architecture.blocks}.{layer}.{path}"
    return {f"{whole}.{name}": mask for name, mask in _module_masks(hf.get_submodule(whole), outputs, None).items()}


def _module_masks(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None) -> dict[str, Tensor]:
    """Masks of a projection's weight and bias for some of its output or of its input coordinates (neither: all).

    A bias adds to outputs, so it goes with outputs and, like the whole sublayer's, to no single input.
    """
    weight_shape = (1, 1)
    chosen = torch.ones(1, dtype=torch.bool)
    if outputs is not None:
        chosen, weight_shape = outputs, (1, -1) if _is_conv1d(module) else (-1, 1)
    elif inputs is not None:
        chosen, weight_shape = inputs, (-1, 1) if _is_conv1d(module) else (1, -1)
    masks = {"weight": chosen.reshape(weight_shape)}
    if getattr(module, "bias", None) is not None and inputs is None:
        masks["bias"] = chosen.reshape(-1)
    return masks


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's projections keep their weight as [in, out], nn.Linear as [out, in]."""
    return not isinstance(module, nn.Linear)


def _in_out(module: nn.Module) -> tuple[int, int]:
    shape = tuple(module.get_parameter("weight").shape)
    return (shape[0], shape[1]) if _is_conv1d(module) else (shape[1], shape[0])
