"""One fact under the microscope: what every sublayer carries at every token of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from mechunlearn.activations import place_of, untouched
from mechunlearn.components import Component
from mechunlearn.facts import Fact
from mechunlearn.html_card import html_card
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.localize.patching import component_effects, exchange
from mechunlearn.localize.scoring import measure_of
from mechunlearn.models import Model, all_components
from mechunlearn.prompts import token_texts


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchingMap:
    """Exact denoising effects for one prompt. Shapes: values [component token]."""

    tokens: tuple[str, ...]
    """The clean prompt's tokens, in order; those without a partner in the donor's prompt score 0."""
    components: tuple[Component, ...]
    values: Float[np.ndarray, "component token"]
    clean: float
    """Logit of the true minus that of the donor's answer on the fact's own run."""
    corrupt: float
    """The same on the donor's run."""
    donor: str | None

    def _repr_html_(self) -> str:
        largest = np.argsort(-np.abs(self.values), axis=None, kind="stable")[:8]
        cells = zip(*np.unravel_index(largest, self.values.shape), strict=True)
        rows = [(self.components[i], f"{j}: {self.tokens[j]}", float(self.values[i, j])) for i, j in cells]
        lines = {
            "prompt": "".join(self.tokens), "logit difference": f"{self.clean:+.2f} clean, {self.corrupt:+.2f} corrupt",
            "donor": self.donor or "random tokens", "cells": f"{self.values.size}, the largest:",
        }  # fmt: skip
        return html_card("exact patching", lines, [("component", "token", "share restored"), *rows])


def patching_map(
    model: Model,
    fact: Fact,
    others: Sequence[Fact],
    *,
    kinds: Sequence[Literal["mlp", "attention"]] = ("mlp", "attention"),
    seed: int = 0,
) -> PatchingMap:
    """Put a sublayer's output at one token of the fact's run into a donor's run: how much of the fact returns?

    value(c, t) = (m(donor's run with c at t from the fact's run) - m(donor's run)) / (m(fact's run) - m(donor's run)),
    m = logit(true answer) - logit(donor's answer).

    Sign and units: share of the logit difference; 1 restores the fact wholly, negative speaks against it. Exact.

    Args:
        others: facts of the same relation to find a donor among (see `pairs.build_pairs`).

    Raises:
        ValueError: no donor can be made, or the two runs do not differ.

    Source: Meng et al. 2022, arXiv:2202.05262, with symmetric replacement (Zhang & Nanda 2023, arXiv:2309.16042).
    """
    pair = next(p for p in build_pairs(model, [fact, *others], seed=seed) if p.fact == 0)
    batch = to_batch(model, [pair])
    components = all_components(model, tuple(kinds))
    one_token_each = torch.eye(len(pair.aligned), dtype=torch.bool, device=model.device)[:, None]
    with untouched(model), torch.no_grad():
        given = exchange(model, batch, [place_of(component) for component in components], restore=True)
        clean, corrupt = (float(batch.logit_diff(given.logits[run])) for run in ("clean", "corrupt"))
        if abs(clean - corrupt) < 1e-6:
            raise ValueError(
                f"patching map: the runs of {fact.subject!r} and {pair.donor!r} do not differ; take another fact"
            )
        effects = component_effects(model, given, components, one_token_each, measure_of(batch, "logit_diff"))[0]
    values = np.zeros((len(components), len(pair.clean)))
    values[:, [c for c, _, _ in pair.aligned]] = effects.double().cpu().numpy() / (clean - corrupt)
    return PatchingMap(
        tokens=token_texts(model, pair.clean),
        components=components,
        values=values,
        clean=clean,
        corrupt=corrupt,
        donor=pair.donor,
    )
