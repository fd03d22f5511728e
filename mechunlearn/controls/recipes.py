"""What the suppressions share: the late layers, what is kept, and a low-rank training as an edit."""

from collections.abc import Mapping, Sequence
from typing import Any

from mechunlearn.activations import Place
from mechunlearn.components import Component
from mechunlearn.edit.edits import WeightEdit, values_in
from mechunlearn.edit.losses import Forms, Loss, batches, fact_tokens, keeping_terms, near_and_far, summed, weighted_sum
from mechunlearn.edit.streams import stream_loss
from mechunlearn.edit.training import lora_trainable, train
from mechunlearn.facts import FactSplit
from mechunlearn.masks import mask_of
from mechunlearn.models import Model


def late_layers(model: Model, share: float) -> range:
    """The last `share` of the layers, at least one."""
    return range(model.n_layers - max(1, round(share * model.n_layers)), model.n_layers)


def keep_stream(model: Model, split: FactSplit, place: Place, *, batch_size: int, forms: Forms, seed: int) -> Loss:
    """`stream_loss` of retained facts, half of them of the forgotten relations, at a place."""
    kept = fact_tokens(model, near_and_far(split.retain_train, split.forget), forms=forms)
    return stream_loss(model, place, batches(kept, batch_size, seed=seed + 1))


def keep_others(
    model: Model, split: FactSplit, *, keep_weight: float, text_weight: float, batch_size: int, forms: Forms, seed: int
) -> Loss:
    """Keep retained facts, half of them of the forgotten relations, and fluency on neutral text.

    What a suppression damages first is the same question about other subjects. Their answers alone hold the last
    layers back on the subjects shown here only; the whole stream before the unembedding does on others, too.

    loss = keep_weight * `stream_loss` of `retain_train` after the last block
    + text_weight * negative log-likelihood per token of neutral text.
    """
    last: Place = ("block", model.n_layers - 1)
    stay = keep_stream(model, split, last, batch_size=batch_size, forms=forms, seed=seed)
    text = keeping_terms(
        model, (), None, retain_weight=0.0, text_weight=1.0, batch_size=batch_size, n_texts=max(1, batch_size // 4),
        forms=forms, seed=seed,
    )  # fmt: skip
    return summed((keep_weight, stay), (text_weight, weighted_sum(text)))


def low_rank_edit(
    model: Model, split: FactSplit, loss: Loss, *,
    layers: Sequence[int], rank: int, steps: int, learning_rate: float,
    method: str, options: Mapping[str, Any], seed: int,
) -> WeightEdit:  # fmt: skip
    """Train a low-rank update of every attention and MLP weight of the layers, and merge it into them.

    Biases are in the edit's mask, too, and stay as they are.
    """
    trainable = lora_trainable(model, rank, layers=layers, seed=seed)
    history = train(model, trainable, loss, steps=steps, learning_rate=learning_rate)
    mask = mask_of(model, [Component(kind, layer) for layer in layers for kind in ("attention", "mlp")])
    return WeightEdit(
        values=values_in(model, mask, trainable.overrides()),
        mask=mask, base_name=model.name, base_sha256=model.sha256, method=method, options=options, seed=seed,
        facts_sha256=split.sha256, history=history,
    )  # fmt: skip
