"""One fact under the microscope: what every sublayer carries at every token of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Change, Place, Tokens, hooked, last_logits, untouched
from mechunlearn.components import Component
from mechunlearn.facts import Fact
from mechunlearn.localize.pairs import build_pairs, to_batch
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
    places: list[Place] = [(component.kind, component.layer) for component in components]  # pyright: ignore[reportAssignmentType]
    at = torch.arange(len(pair.aligned), device=model.device)
    repeated = Tokens(
        ids=batch.corrupt.ids.repeat(len(at), 1), mask=batch.corrupt.mask.repeat(len(at), 1),
        last=batch.corrupt.last.repeat(len(at)),
    )  # fmt: skip

    def restore(clean: Tensor) -> Change:
        def change(value: Tensor) -> Tensor:
            changed = value.clone()
            changed[at, batch.corrupt_positions[0]] = clean[0, batch.clean_positions[0]]
            return changed

        return change

    with untouched(model), torch.no_grad():
        with hooked(model, record=places) as seen:
            clean = float(batch.logit_diff(last_logits(model, batch.clean)))
        corrupt = float(batch.logit_diff(last_logits(model, batch.corrupt)))
        if abs(clean - corrupt) < 1e-6:
            raise ValueError(
                f"patching map: the runs of {fact.subject!r} and {pair.donor!r} do not differ; take another fact"
            )
        values = np.zeros((len(components), len(pair.clean)))
        for row, place in enumerate(places):
            with hooked(model, change={place: restore(seen[place])}):
                logits = last_logits(model, repeated)
            patched = (logits[:, pair.answer] - logits[:, pair.counterfactual]).double().cpu().numpy()
            values[row, [c for c, _, _ in pair.aligned]] = (patched - corrupt) / (clean - corrupt)
    return PatchingMap(
        tokens=token_texts(model, pair.clean),
        components=components,
        values=values,
        clean=clean,
        corrupt=corrupt,
        donor=pair.donor,
    )
