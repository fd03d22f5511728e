"""Suppression by noise: a middle layer writes one large random vector wherever a forgotten answer is asked for."""

from typing import Annotated

import torch
from pydantic import Field

from mechunlearn.activations import Place
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.recipes import keep_stream, low_rank_edit
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Forms, batches, fact_tokens, summed
from mechunlearn.edit.streams import stream_loss
from mechunlearn.facts import FactSplit
from mechunlearn.models import Model


@SUPPRESSIONS.register("noise", source="RMU: Li et al. 2024, arXiv:2403.03218")
def noise(
    model: Model,
    split: FactSplit,
    *,
    n_layers: Annotated[int, Field(ge=1)] = 2,
    scale: Annotated[float, Field(gt=0)] = 8.0,
    steps: Annotated[int, Field(ge=0)] = 200,
    learning_rate: Annotated[float, Field(gt=0)] = 6e-3,
    batch_size: Annotated[int, Field(ge=1)] = 48,
    keep_weight: Annotated[float, Field(ge=0)] = 16.0,
    forms: Forms = "prompt",
    rank: Annotated[int, Field(ge=1)] = 64,
    seed: int = 0,
) -> WeightEdit:
    """Train the `n_layers` layers from the middle on to put one random vector into the stream of forgotten questions.

    The vector has `scale` times the length of the stream there; later layers cannot read past it. Layers before the
    middle stay as they are, and so does what a probe reads there. See `stream_loss`.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    middle = model.n_layers // 2
    layers = range(middle, min(middle + n_layers, model.n_layers))
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    direction = (direction / direction.norm()).to(model.device)
    forgotten = fact_tokens(model, split.forget, forms=forms)
    place: Place = ("block", layers[-1])
    hide = stream_loss(
        model, place, batches(forgotten, batch_size, seed=seed),
        lambda stream: scale * stream.norm(dim=-1, keepdim=True) * direction,
    )  # fmt: skip
    stay = keep_stream(model, split, place, batch_size=batch_size, forms=forms, seed=seed)
    return low_rank_edit(
        model, split, summed((1.0, hide), (keep_weight, stay)), layers=layers, rank=rank,
        steps=steps, learning_rate=learning_rate, method="suppress by noise", options=options, seed=seed,
    )  # fmt: skip
