"""What the closed-form editors share beside their formulas: text, values and weights in, a WeightEdit out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.edit.budget import brought_within, watched_and_retained
from mechunlearn.edit.covariance import cache_folder, second_moments
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.keys_values import Row, rows_of
from mechunlearn.edit.options import Filled
from mechunlearn.edit.projections import Projections, masked_projections, projections
from mechunlearn.edit.value_search import ValueSearch
from mechunlearn.facts import Fact, FactSplit, hash_facts
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import render

Moments = Mapping[int, Float[Tensor, "d_mlp d_mlp"]]
Write = Callable[[Projections, Moments, Sequence[Row], ValueSearch], Float[Tensor, "step subject"]]
"""Change the projections, given C by layer, the subjects' texts and how to search values -> losses of the search."""


def closed_form_edit(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    write: Write,
    *,
    method: str,
    own: Mapping[str, Any],
    solving: Filled,
    layers: Callable[[list[int]], list[int]],
) -> WeightEdit:
    """Let `write` change the masked output projections, and keep what became of them; the model stays as it is.

    Args:
        own: the editor's own options, for the record.
        solving: the others; where C is kept is no part of the record, for it changes nothing.
        layers: which of the masked layers are edited, such as `up_to(model, layer, method)`.

    Raises:
        ValueError: a mask without output projections, or facts that cannot be edited.
    """
    cache = solving["cache"]
    options: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in {**own, **solving}.items() if name != "cache"
    }  # fmt: skip
    edited = masked_projections(model, mask, method, layers)
    losses, base_sha256, limit = torch.zeros(0, 1), model.sha256, solving["max_damage"]
    watched, retained = watched_and_retained(split, limit)
    notes: Mapping[str, Any] = {}
    with projections(model, edited) as weights:
        if weights.layers:
            rows = rows_of(
                model, split.forget, retained, forms=options["forms"], prefixes=options["prefixes"],
                essence=options["essence"], seed=options["seed"],
            )  # fmt: skip
            moments = kept_moments(
                model, weights.layers, retained, options["text"], n_texts=options["n_texts"],
                retain_share=options["retain_share"], cache=cache,
            )  # fmt: skip
            search = ValueSearch(**{field.name: options[field.name] for field in fields(ValueSearch)})
            losses = write(weights, moments, rows, search)
        values = weights.values()
    if limit is not None and values:
        values, notes = brought_within(model, edited, values, watched, limit=limit)
    return WeightEdit(
        values=values, mask=edited, base_name=model.name, base_sha256=base_sha256,
        method=method, options=options, seed=options["seed"],
        facts_sha256=hash_facts((*split.forget, *split.retain_train)), history=tuple(losses.mean(dim=1).tolist()),
        notes=notes,
    )  # fmt: skip


def up_to(model: Model, layer: int | None, method: str) -> Callable[[list[int]], list[int]]:
    """The masked layers up to this one; None: up to the last, but the model's last layer only if it is alone.

    After the model's last MLP no attention reads what stands at the subject.

    Raises:
        ValueError: when called, a layer that is not masked.
    """

    def chosen(masked: list[int]) -> list[int]:
        if layer is None:
            return [each for each in masked if each < model.n_layers - 1] or masked
        if layer not in masked:
            raise ValueError(f"{method}: got layer {layer}, allowed: the masked MLPs, {', '.join(map(str, masked))}")
        return [each for each in masked if each <= layer]

    return chosen


def kept_moments(
    model: Model, layers: Sequence[int], retain: Sequence[Fact], text: Sequence[str] | None, *,
    n_texts: int, retain_share: float, cache: bool | str,
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:  # fmt: skip
    """C = (1 - retain_share) * E[k k^T] over text + retain_share * E[k k^T] over statements of retained facts; float64.

    Only the text's part is kept on disk: the other is different with every split.

    Args:
        retain: at most `n_texts` of them are stated, of as many subjects as can be; with none, C is the text's.
        text: None is `n_texts` passages of neutral text, always the same.
        cache: see `covariance.cache_folder`.
    """
    share = retain_share if retain else 0.0
    texts = neutral_text(n_texts, seed=0) if text is None else text
    parts = [(1 - share, texts, cache_folder(cache)), (share, _statements(retain)[:n_texts], None)]
    total = dict.fromkeys(layers, torch.zeros((), dtype=torch.float64, device=model.device))
    for weight, passages, folder in parts:
        if weight and layers:
            found = second_moments(model, layers, passages, cache=folder)
            total = {layer: total[layer] + weight * found[layer].to(model.device, torch.float64) for layer in layers}
    return total


def _statements(facts: Sequence[Fact]) -> list[str]:
    """Every fact's prompt with its answer; first one fact of each subject, then the second ones, and so on."""
    seen: dict[str, int] = {}
    turns: list[tuple[int, str]] = []
    for fact in facts:
        seen[fact.subject] = seen.get(fact.subject, -1) + 1
        turns.append((seen[fact.subject], f"{render(fact, 'prompt')} {fact.target_true}."))
    return [text for _, text in sorted(turns, key=lambda turn: turn[0])]
