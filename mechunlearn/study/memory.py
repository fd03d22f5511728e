"""What the study's trainings and attacks hold on the card: upper bounds from shapes alone.

Of tensors; what the allocator and the kernels take besides is not in them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.health import N_TEXTS
from mechunlearn.components import Component
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.recipes import late_layers
from mechunlearn.edit.prefix import DEFAULT_GB, GB
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

    @classmethod
    def of_attacker(cls, rows: int) -> "Batch":
        """What `resistant_inject` shows its attacker in a step; it looks at as many other questions afterwards."""
        return cls.of(2 * max(1, rows // 4), kinds=1, texts=0)

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(
            tokens=self.tokens + other.tokens, kept=self.kept + other.kept, width=max(self.width, other.width)
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


def lowest_layer(mask: ParameterMask) -> int:
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

    Checkpointed (the editors' option `checkpoint`) it takes b d, and one block at a time is computed anew.
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


def training_memory(
    model: Model, mask: ParameterMask, batch: Batch, *, passes: int, rank: int | None = None
) -> dict[str, float]:
    """GB on the card while an edit is trained, by what they hold; and their total, also if it were checkpointed.

    trained: float32 value, gradient and AdamW's two moments, 16 bytes a trained number. copies: see `_copy_bytes`.
    cache: what the blocks below the mask computed, b d a token.

    Args:
        passes: forward passes whose rows are cached, as far as there is room; 0: nothing is.
    """
    lowest = lowest_layer(mask)
    seen = passes * batch.tokens * model.d_model * model.dtype.itemsize if lowest else 0
    held = {
        "weights": weight_bytes(model), "trained": 16 * n_leaves(mask, rank), "copies": _copy_bytes(model, mask, rank),
        "cache": min(seen, DEFAULT_GB * GB),
        "activations": activation_bytes(model, batch, lowest), "logits": logit_bytes(model, batch),
    }  # fmt: skip
    return _in_gb(held, held["activations"] - activation_bytes(model, batch, lowest, checkpointed=True))


def _copy_bytes(model: Model, mask: ParameterMask, rank: int | None) -> int:
    """8 bytes a trained number for the damage budget's copies and the stand-ins in the model's type.

    Of a low-rank update the stand-ins are whole matrices, with gradients: 2 b bytes a masked entry.
    """
    return 8 * n_leaves(mask, rank) + (0 if rank is None else 2 * model.dtype.itemsize * mask.n_selected)


def resistant_memory(
    model: Model, mask: ParameterMask, rows: int, *, rank: int | None = None, attack_rank: int | None = None
) -> dict[str, float]:
    """GB on the card while `resistant_inject` trains, columns as in `training_memory`; it has no cache or checkpoints.

    Beside an edit there are the attacker's own numbers, 16 bytes each, and all weights of attention and MLPs anew,
    whatever its rank. The larger of two moments: when the attacker has stepped, its change and the weights with that
    are there, b bytes each, but of the edit no gradient yet, and one term's activations; in the backward pass of the
    edit all of these, but the change no more.
    """
    b, lowest, leaves = model.dtype.itemsize, lowest_layer(mask), n_leaves(mask, rank)
    attacker, everything = 16 * n_leaves(whole(model), attack_rank), b * whole(model).n_selected
    told, shown = Batch.of(rows, kinds=1, texts=0), Batch.of_attacker(rows)
    batch = Batch.of(rows) + shown
    attacked = {
        "weights": weight_bytes(model), "trained": 12 * leaves + attacker,
        "copies": 4 * leaves + b * mask.n_selected + 2 * everything, "cache": 0,
        "activations": activation_bytes(model, told, lowest) + activation_bytes(model, shown, 0),
        "logits": logit_bytes(model, told + shown),
    }  # fmt: skip
    learning = {
        "weights": weight_bytes(model), "trained": 16 * leaves + attacker,
        "copies": _copy_bytes(model, mask, rank) + b * mask.n_selected + everything, "cache": 0,
        "activations": activation_bytes(model, batch, lowest), "logits": logit_bytes(model, batch),
    }  # fmt: skip
    return _in_gb(max(attacked, learning, key=lambda held: sum(held.values())))


def control_memory(model: Model, kind: str, options: Mapping[str, Any]) -> dict[str, float]:
    """GB on the card while a positive control is trained, columns as in `training_memory`."""
    filled = SUPPRESSIONS.get(kind).validate(options)
    return training_memory(
        model, control_mask(model, filled), control_batch(filled), passes=filled["steps"], rank=filled["rank"]
    )


def control_mask(model: Model, filled: Mapping[str, Any]) -> ParameterMask:
    """The last layers, as a suppression trains them; of `noise`, which trains some from the middle on, all of these."""
    layers = late_layers(model, filled.get("layer_share", 0.5))
    return mask_of(model, [Component(kind, layer) for layer in layers for kind in ("attention", "mlp")])


def control_batch(filled: Mapping[str, Any]) -> Batch:
    """Of a suppression's step: forgotten questions (with two answers, say), retained ones, and passages."""
    rows = filled["batch_size"]
    return Batch.of(rows, kinds=3, texts=max(1, rows // 4))


def _in_gb(held: Mapping[str, float], saved: float = 0.0) -> dict[str, float]:
    """Bytes as GB, with their total, and the total less what checkpoints would save."""
    total = sum(held.values())
    made = {**held, "total": total, "checkpointed": total - max(saved, 0)}  # of a single block they save nothing
    return {name: size / GB for name, size in made.items()}


def attack_memory(model: Model, name: str, options: Mapping[str, Any]) -> dict[str, float]:
    """GB on the card at the worst moment of an attack, columns as in `training_memory`.

    Relearning trains every matrix from the first block up: all of it, or a low-rank update of it. Rounding holds each
    matrix twice more. Both measure fluency on whole passages, 16 at once; those that only ask need no more logits.
    """
    filled = ATTACKS.get(name).validate(options)
    texts = logit_bytes(model, Batch(tokens=0, kept=N_TEXTS * TEXT_TOKENS, width=0)) / GB
    if name == "relearning":
        ranks = [int(kind.partition(":")[2] or 8) for kind in filled["kinds"] if kind.startswith("lora")]
        rank = None if {"full", "last"} & set(filled["kinds"]) else max(ranks)
        held = training_memory(
            model, whole(model), Batch.of(filled["batch_size"], kinds=1, texts=0), passes=0, rank=rank
        )
    else:
        doubled = 2 * model.dtype.itemsize * whole(model).n_selected if name == "quantization" else 0
        held = {"weights": weight_bytes(model), "trained": 0, "copies": doubled, "cache": 0, "activations": 0}
        held = _in_gb({**held, "logits": 0})
    more = max(0.0, texts - held["logits"])
    return held | {key: held[key] + more for key in ("logits", "total", "checkpointed")}


def weight_bytes(model: Model) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())


def d_vocab(model: Model) -> int:
    """Size of the vocabulary."""
    return int(model.hf.config.vocab_size)
