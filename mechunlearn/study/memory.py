"""What the study's trainings and attacks hold on the card: upper bounds from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.health import N_TEXTS
from mechunlearn.masks import ParameterMask, mask_of
from mechunlearn.models import Model, all_components

PROMPT_TOKENS, TEXT_TOKENS, KEPT = 16, 128, 6
"""Of a question with its answer; of a passage; positions of a question whose logits are computed (names differ)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One forward pass of a training: the rows of its terms together, for all are kept until the backward pass."""

    tokens: int
    kept: int
    """Positions whose logits are computed."""
    width: int
    """Of the longest row."""

    @classmethod
    def of(cls, rows: int, *, kinds: int = 2, texts: int | None = None) -> "Batch":
        """`rows` questions of each kind, and passages: an eighth as many, as editors have it."""
        texts = max(1, rows // 8) if texts is None else texts
        return cls(
            tokens=kinds * rows * PROMPT_TOKENS + texts * TEXT_TOKENS,
            kept=kinds * rows * KEPT + texts * (TEXT_TOKENS - 1), width=TEXT_TOKENS if texts else PROMPT_TOKENS,
        )  # fmt: skip


def n_leaves(mask: ParameterMask, rank: int | None = None) -> int:
    """Numbers that are trained: every masked entry, or rank * (d_in + d_out) a masked matrix."""
    if rank is None:
        return mask.n_selected
    return sum(rank * sum(shape) for shape in mask.shapes.values() if len(shape) == 2)


@lru_cache(maxsize=2)
def whole(model: Model) -> ParameterMask:
    """Everything that could be edited: every attention and MLP parameter."""
    return mask_of(model, all_components(model))


def first_layer(mask: ParameterMask) -> int:
    """Down to which block a backward pass goes."""
    return min(component.layer for component in mask.components)


def activation_bytes(model: Model, batch: Batch, first: int, *, checkpointed: bool = False) -> int:
    """What the blocks from `first` up keep for the backward pass.

    With d = d_model, h and g heads and key-value heads of d_head, m neurons, k of the MLP's matrices read the stream
    (2 where gated), b bytes a number, a token takes in a block

        4 d (norms)                     the norms' inputs in float32
        + 2 b (h + g) d_head            query, key, value and what attention returns
        + b (2 d + (k + 2) m)           inputs of attention and MLP, activations and their product
        + 6 b h width                   attention patterns, where they are computed as such (Gemma 2)

    Checkpointed (which the trainer does not do) it takes b d, and one block at a time is computed anew.
    """
    size, b, a = model.sizes, model.dtype.itemsize, model.architecture
    block = batch.tokens * (
        4 * size.d_model * len(a.norms)
        + 2 * b * (size.n_heads + size.n_kv_heads) * size.d_head
        + b * (2 * size.d_model + (len(a.mlp_in) + 2) * size.d_mlp)
        + 6 * b * size.n_heads * batch.width
    )
    n = size.n_layers - first
    return n * batch.tokens * b * size.d_model + block if checkpointed else n * block


def logit_bytes(model: Model, batch: Batch) -> int:
    """Logits in the model's type and in float32, and gradients of both: 2 (b + 4) a position and vocabulary entry."""
    return 2 * (model.dtype.itemsize + 4) * batch.kept * d_vocab(model)


def training_memory(model: Model, mask: ParameterMask, batch: Batch, *, rank: int | None = None) -> dict[str, float]:
    """GB on the card while an edit is trained, by what they hold.

    trained: float32 value, gradient and AdamW's two moments, 16 bytes a trained number. copies: 8 bytes more each for
    the damage budget's copies and the stand-ins in the model's type; of a low-rank update the stand-ins are whole
    matrices, with gradients: 2 b bytes a masked entry.
    """
    leaves = n_leaves(mask, rank)
    first = first_layer(mask)
    copies = 8 * leaves + (0 if rank is None else 2 * model.dtype.itemsize * mask.n_selected)
    held = {
        "weights": weight_bytes(model), "trained": 16 * leaves, "copies": copies,
        "activations": activation_bytes(model, batch, first), "logits": logit_bytes(model, batch),
    }  # fmt: skip
    held["total"] = sum(held.values())
    saved = held["activations"] - activation_bytes(model, batch, first, checkpointed=True)
    return {name: size / 1e9 for name, size in (held | {"checkpointed": held["total"] - saved}).items()}


def attack_memory(model: Model, name: str, options: Mapping[str, Any]) -> dict[str, float]:
    """GB on the card at the worst moment of an attack, columns as in `training_memory`.

    Relearning trains every matrix from the first block up: all of it, or a low-rank update of it. Rounding holds each
    matrix twice more. Both measure fluency on whole passages, 16 at once; those that only ask need no more logits.
    """
    filled = ATTACKS.get(name).validate(options)
    texts = logit_bytes(model, Batch(tokens=0, kept=N_TEXTS * TEXT_TOKENS, width=0)) / 1e9
    if name == "relearning":
        ranks = [int(kind.partition(":")[2] or 8) for kind in filled["kinds"] if kind.startswith("lora")]
        rank = None if {"full", "last"} & set(filled["kinds"]) else max(ranks)
        held = training_memory(model, whole(model), Batch.of(filled["batch_size"], kinds=1, texts=0), rank=rank)
    else:
        doubled = 2 * model.dtype.itemsize * whole(model).n_selected if name == "quantization" else 0
        held = {"weights": weight_bytes(model) / 1e9, "trained": 0.0, "copies": doubled / 1e9, "activations": 0.0}
        held |= {"logits": 0.0, "total": sum(held.values()), "checkpointed": sum(held.values())}
    more = max(0.0, texts - held["logits"])
    return held | {key: held[key] + more for key in ("logits", "total", "checkpointed")}


def weight_bytes(model: Model) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())


def d_vocab(model: Model) -> int:
    """Size of the vocabulary."""
    return int(model.hf.config.vocab_size)
