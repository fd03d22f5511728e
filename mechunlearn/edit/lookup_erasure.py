"""Overwrite what the masked MLPs look up: the subject's stream keeps everything but which answer it holds."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.budget import brought_within, watched_and_retained
from mechunlearn.edit.closed_form import kept_moments
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.erased_streams import Asked, asked_texts, erased, keys_of, streams_of
from mechunlearn.edit.least_squares import damped, masked_update
from mechunlearn.edit.projections import Projections, before_norm, masked_projections, projections
from mechunlearn.facts import Fact, FactSplit, hash_facts
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("lookup_erasure", source="ours; least squares of Meng et al. 2022, arXiv:2210.07229")
def lookup_erasure(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    steps: Annotated[int, Field(ge=0, description="sweeps over the masked layers")] = 3,
    keep_weight: Annotated[float, Field(gt=0)] = 5.0,
    text: Sequence[str] | None = None,
    n_texts: Annotated[int, Field(ge=1)] = 200,
    max_damage: Annotated[float | None, Field(gt=0)] = None,
    cache: bool | str = True,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: int = 0,
) -> WeightEdit:
    """Take the answer out of the stream at each forgotten subject's last token, layer by layer, by least squares.

    After every masked MLP the stream h of a forgotten subject should be h - P (h - mu), in which no linear probe tells
    the answers of the fact's relation apart (`erased_streams.answer_eraser`, of all its facts to forget and to retain).
    No wrong answer is taught and the rest of the stream stays, so the subject is met as one whose answer is not known.
    Each masked layer in turn, from the first, and that `steps` times, so that later changes are made up for:

        W += R^T K (n * keep_weight * C + K^T K)^-1

    with K [n d_mlp] the keys now, one for each text (prompts, paraphrases and questions alike: no averaging), R what
    is missing of that layer's own stream, and C the second moment of keys to keep: tokens of running text and of
    retained statements, plus the last tokens of retained subjects of the same relations in all forms. Only masked
    entries of output projections change.

    Args:
        keep_weight: more keeps more and erases less.
        text: what else to keep the model by; None means `n_texts` passages of the bundled neutral text.
        max_damage: nats; the whole change is scaled down until it disturbs watched retained facts no more, see
            `budget`. They are in no C.
        cache: where the text's part of C is kept, see `covariance.cache_folder`.

    Raises:
        ValueError: a mask without MLP output projections, or nothing to forget.

    Differs from MEMIT: values are computed, not searched; every layer has its own; each text is a key.
    Source: ours. Least squares: Meng et al. 2022, arXiv:2210.07229; eraser: Belrose et al. 2023, arXiv:2306.03819.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "mask", "split", "cache")}
    if not split.forget:
        raise ValueError("lookup_erasure: got no facts to forget; give a split with some")
    edited = masked_projections(model, mask, "lookup_erasure")
    base_sha256, notes = model.sha256, {}
    watched, retained = watched_and_retained(split, max_damage)
    with projections(model, edited) as weights:
        if weights.layers and steps:
            asked, kept = asked_texts(model, split.forget), asked_texts(model, _near(retained, split.forget))
            wanted = erased(model, asked, kept, weights.layers, batch_size=batch_size)
            moments = kept_moments(
                model, weights.layers, retained, text, n_texts=n_texts, retain_share=0.5, cache=cache
            )
            keys = keys_of(model, kept, weights.layers, batch_size=batch_size)
            moments = {layer: moments[layer] + keys[layer].T @ keys[layer] / max(len(kept), 1) for layer in moments}
            for layer in (layer for _ in range(steps) for layer in weights.layers):
                write(model, weights, layer, asked, wanted[layer], moments[layer], keep_weight, batch_size)
        values = weights.values()
    if max_damage is not None and values:
        values, notes = brought_within(model, edited, values, watched, limit=max_damage)
    return WeightEdit(
        values=values, mask=edited, base_name=model.name, base_sha256=base_sha256, method="lookup_erasure",
        options=options, seed=seed, facts_sha256=hash_facts((*split.forget, *split.retain_train)), notes=notes,
    )  # fmt: skip


def write(
    model: Model, weights: Projections, layer: int, asked: Sequence[Asked], wanted: Float[Tensor, "text d_model"],
    moment: Float[Tensor, "d_mlp d_mlp"], keep_weight: float, batch_size: int,
) -> None:  # fmt: skip
    """One least-squares update of one layer towards where its stream should be."""
    keys = keys_of(model, asked, [layer], batch_size=batch_size)[layer]
    missing = wanted - streams_of(model, asked, [layer], batch_size=batch_size)[layer]
    missing = before_norm(model, layer, weights.outputs(layer, keys), missing)
    weights.add(
        layer, masked_update(weights.allowed(layer), moment, keys, missing, partial(against_kept, weight=keep_weight))
    )


def against_kept(
    moment: Float[Tensor, "column column"], keys: Float[Tensor, "key column"], missing: Float[Tensor, "key row"], *,
    weight: float,
) -> Float[Tensor, "row column"]:  # fmt: skip
    """The update Delta that minimises mean over keys |Delta k - missing|^2 + weight * tr(Delta C Delta^T)."""
    return torch.linalg.solve(len(keys) * weight * damped(moment) + keys.T @ keys, keys.T @ missing).T


def _near(retained: Sequence[Fact], forget: Sequence[Fact]) -> list[Fact]:
    """The retained facts of the forgotten relations."""
    relations = {fact.relation for fact in forget}
    return [fact for fact in retained if fact.relation in relations]
