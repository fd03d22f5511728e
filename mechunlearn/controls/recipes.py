"""What the suppressions share: the late layers, what is kept, and a low-rank training as an edit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mechunlearn.components import Component
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Forms, Term, keeping_terms, near_and_far
from mechunlearn.edit.training import Forward, lora_trainable, train
from mechunlearn.facts import FactSplit
from mechunlearn.masks import mask_of
from mechunlearn.models import Model


def late_layers(model: Model, share: float) -> range:
    """The last `share` of the layers, at least one."""
    return range(model.n_layers - max(1, round(share * model.n_layers)), model.n_layers)


def keep_others(
    model: Model, split: FactSplit, *,
    retain_weight: float, text_weight: float, batch_size: int, forms: Forms, seed: int,
) -> list[Term]:  # fmt: skip
    """Keep retained facts, half of them of the forgotten relations, and fluency on neutral text.

    What a suppression damages first is the same question about other subjects.
    """
    return keeping_terms(
        model, near_and_far(split.retain_train, split.forget), None, retain_weight=retain_weight,
        text_weight=text_weight, batch_size=batch_size, n_texts=max(1, batch_size // 4), forms=forms, seed=seed,
    )  # fmt: skip


def low_rank_edit(
    model: Model, split: FactSplit, loss: Callable[[int, Forward], Tensor], *,
    layers: Sequence[int], rank: int, steps: int, learning_rate: float,
    method: str, options: Mapping[str, Any], seed: int,
) -> WeightEdit:  # fmt: skip
    """Train a low-rank update of every attention and MLP weight of the layers, and merge it into them.

    Biases are in the edit's mask, too, and stay as they are.
    """
    trainable = lora_trainable(model, rank, layers=layers, seed=seed)
    history = train(model, trainable, loss, steps=steps, learning_rate=learning_rate)
    mask = mask_of(model, [Component(kind, layer) for layer in layers for kind in ("attention", "mlp")])
    parameters = dict(model.hf.named_parameters())
    merged = {name: tensor.detach() for name, tensor in trainable.overrides().items()}
    return WeightEdit(
        values={name: merged.get(name, parameters[name].detach())[mask.full(name)].cpu() for name in mask.entries},
        mask=mask, base_name=model.name, base_sha256=model.sha256, method=method, options=options, seed=seed,
        facts_sha256=split.sha256, history=history,
    )  # fmt: skip
