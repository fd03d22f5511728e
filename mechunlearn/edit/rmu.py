"""Representation misdirection: forgotten prompts' stream goes to a random vector, training the masked weights only."""

from typing import Annotated, Unpack

import torch
from pydantic import Field

from mechunlearn.activations import Place
from mechunlearn.edit import EDITORS
from mechunlearn.edit.budget import watched_and_retained
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import batches, fact_tokens, near_and_far, text_tokens
from mechunlearn.edit.options import Unkept, filled
from mechunlearn.edit.streams import all_tokens, masked_layers, prompt_tokens, stream_loss
from mechunlearn.edit.trained import forget_rows, trained_edit
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text


@EDITORS.register("rmu", source="Li et al. 2024, arXiv:2403.03218")
def rmu(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    layer: Annotated[
        int | None, Field(ge=0, description="after which the stream is steered; None: the last masked")
    ] = None,
    steering: Annotated[float, Field(gt=0)] = 4.0,
    alpha: Annotated[float, Field(ge=0)] = 10.0,
    forget_weight: Annotated[float, Field(ge=0)] = 1.0,
    **training: Unpack[Unkept],
) -> WeightEdit:
    """Train the stream of the forgotten facts' prompts to one random vector, and that of other text to stay.

    loss = forget_weight * ||h - steering * s * u||^2 / s2 over the tokens of prompts to forget
         + alpha * ||h - h0||^2 / s2 over those of retained facts, and the same over those of running text

    with h the stream after block `layer`, h0 the original's, u a random unit vector, s the mean length of h0 over a
    batch's tokens and s2 its mean square. Nothing after `layer` is computed. Keeping the model's output as well weighs
    0 unless it is given weights, see `edit.options.Training`.

    The tokens before the subject are the same in forgotten and retained facts of a relation, where the two terms pull
    against each other: the ratio of `steering` to `alpha` decides which wins.

    Args:
        layer: the source steers after the last of the three layers that it trains.
        steering: length of the vector, of that of the stream.
        alpha: of the retained stream.

    Raises:
        ValueError: a layer before all masked ones or after the last, a part that is needed is empty, or the loss
            diverges.

    Differs from the source: its vector has a length of its own for each model (c = 6.5 for Zephyr 7B), here it follows
        the stream's; u is drawn from the normal distribution, as LayerNorm subtracts most of a vector of positive
        entries; the first token is left out, see `prompt_tokens`; retained facts are kept, not only text.
    Source: Li et al. 2024, arXiv:2403.03218 (where alpha is 1200 for Zephyr 7B).
    """
    options = filled(training, Unkept)
    layers = masked_layers(model, mask)
    at = max(layers, default=0) if layer is None else layer
    if not min(layers, default=0) <= at < model.n_layers:
        raise ValueError(
            f"rmu: got layer {at}, allowed: {min(layers, default=0)} (the first masked one) to {model.n_layers - 1}"
        )
    size, seed = options["batch_size"], options["seed"]
    drawn = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed)).to(model.device)
    direction = drawn / drawn.norm()
    place: Place = ("block", at)
    hide = stream_loss(
        model, place, forget_rows(model, split, options),
        lambda stream: steering * stream.norm(dim=-1).mean() * direction, where=prompt_tokens,
    )  # fmt: skip
    own = [(forget_weight, hide)]
    if alpha:
        _, retained = watched_and_retained(split, options["max_damage"])
        facts = fact_tokens(model, near_and_far(retained, split.forget), forms=options["forms"])
        text = text_tokens(model, neutral_text(64, seed=seed) if options["text"] is None else options["text"])
        for rows in (batches(facts, size, seed=seed + 1), batches(text, max(1, size // 8), seed=seed + 2)):
            own.append((alpha, stream_loss(model, place, rows, where=all_tokens)))
    return trained_edit(
        model, mask, split, own, method="rmu",
        options={"layer": at, "steering": steering, "alpha": alpha, "forget_weight": forget_weight}, training=options,
    )  # fmt: skip
