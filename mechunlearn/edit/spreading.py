"""Values that are missing at the last layer, spread over all: what MEMIT and AlphaEdit share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mechunlearn.activations import Place, untouched
from mechunlearn.edit.closed_form import (
    Solve,
    before_norm,
    layers_of,
    masked_projections,
    masked_update,
    projections,
    kept_moments,
)
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.keys_values import Row, ValueSearch, means_at_subjects, search_values
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


def spread_edit(
    model: Model, mask: ParameterMask, rows: Sequence[Row], search: ValueSearch, solve: Solve, *,
    retain, text: Sequence[str] | None, n_texts: int, cache: bool | str,n_retained,retain_share,
    method: str, options: Mapping[str, Any], seed: int, facts_sha256: str,
) -> WeightEdit:  # fmt: skip
    """Search values at the last masked layer, then change each masked layer to add its share of what is missing there.

    With z the stream after the last layer once it has its values, for each layer from the first:
        missing = (z - stream after the last layer now) / (number of layers from this one on)
        W += solve(C, keys now, missing)
    Streams and keys are means over the same texts of each subject, at its last token.
    """
    edited = masked_projections(model, mask, method)
    base_sha256, history = model.sha256, ()
    layers = layers_of(model, edited)
    moments = kept_moments(model, layers, retain, text, n_texts=n_texts, cache=cache, n_retained=n_retained, retain_share=retain_share) if layers else {}
    with projections(model, edited) as weights:
        if layers:
            history = _spread(model, weights, layers, moments, rows, search, solve)
        values = weights.values()
    return WeightEdit(
        values=values, mask=edited, base_name=model.name, base_sha256=base_sha256,
        method=method, options=options, seed=seed, facts_sha256=facts_sha256, history=history,
    )  # fmt: skip


def _spread(model, weights, layers, moments, rows, search, solve):
    last = layers[-1]
    end: Place = ("block", last)
    size = search.batch_size
    places: list[Place] = [("neuron", last), ("mlp", last), end]
    before = means_at_subjects(model, rows, places, batch_size=size)
    u = weights.outputs(last, before["neuron", last])
    norms = before[end].norm(dim=1) * u.norm(dim=1) / before["mlp", last].norm(dim=1)
    delta, losses = search_values(model, rows, last, norms, search)
    wanted = means_at_subjects(model, rows, [end], batch_size=size, layer=last, delta=delta)[end]
    for i, layer in enumerate(layers):
        now = means_at_subjects(model, rows, [("neuron", layer), end], batch_size=size)
        keys, share = now["neuron", layer], (wanted - now[end]) / (len(layers) - i)
        share = before_norm(model, layer, weights.outputs(layer, keys), share)
        weights.add(layer, masked_update(weights.allowed(layer), moments[layer], keys, share, solve))
    return tuple(losses.mean(dim=1).tolist())
