"""Several MLPs ablated at once: what a band of layers is needed for, and what it suffices for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Change, Place, hooked, last_logits, untouched
from mechunlearn.facts import Fact
from mechunlearn.localize.pairs import SUBJECT_ROLES, PairBatch, batches, build_pairs, record_donor
from mechunlearn.models import Model

AblationRole = Literal["subject", "last", "all"]
_TOKENS: Mapping[AblationRole, tuple[str, ...]] = {
    "subject": SUBJECT_ROLES,
    "last": ("last",),
    "all": (*SUBJECT_ROLES, "between", "last"),
}


@dataclass(frozen=True, kw_only=True)
class Band:
    """Neighbouring MLPs, first to last layer inclusive, at the subject's tokens or at the last one."""

    first: int
    last: int
    role: AblationRole = "subject"
    held: tuple[int, ...] = ()
    """Layers whose MLPs write what they write on the clean run, at every token, whatever reaches them."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer of the band."""
        return tuple(range(self.first, self.last + 1))


def ablate_bands(
    model: Model,
    facts: Sequence[Fact],
    bands: Sequence[Band],
    *,
    pairs_per_fact: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Ablate the MLPs of several layers at once, each with its output on the donor's run; band by band.

    Returns:
        One row per pair and band: fact (its index), first, last, role, has_donor (False where the subject was replaced
        by random tokens); clean and correct (the true answer beats all other candidates, before and under ablation),
        donor (the highest candidate is the donor's answer). The share of clean - correct is what the band is needed
        for, that of donor among pairs that have one what it suffices for.

    Raises:
        ValueError: no or unknown layers, or a fact that cannot be paired.
    """
    for band in bands:
        layers = (*band.held, band.first, band.last)
        inside = all(0 <= layer < model.n_layers for layer in layers) and not set(band.held) & set(band.layers)
        if not inside or band.first > band.last or band.role not in _TOKENS:
            raise ValueError(
                f"ablate_bands: got layers {band.first} to {band.last} at {band.role!r}, allowed: "
                f"within 0 to {model.n_layers - 1}, first to last, at {', '.join(_TOKENS)}, none of them held"
            )
    rows: list[tuple[int, int, int, str, bool, bool, bool, bool]] = []
    places: list[Place] = [("mlp", layer) for layer in sorted({layer for band in bands for layer in band.layers})]
    held: list[Place] = [("mlp", layer) for layer in sorted({layer for band in bands for layer in band.held})]
    with untouched(model), torch.no_grad():
        for batch in batches(model, build_pairs(model, facts, pairs_per_fact=pairs_per_fact, seed=seed), batch_size):
            with hooked(model, record=held) as own:
                clean = (batch.chosen(last_logits(model, batch.clean)) == batch.answer).tolist()
            donors = record_donor(model, batch, places)
            for band in bands:
                changed = {place: donors[place] for place in places if place[1] in band.layers}
                kept = {place: own[place] for place in held if place[1] in band.held}
                chosen = batch.chosen(ablated_logits(model, batch, changed, band.role, kept))
                correct, donor = (chosen == batch.answer).tolist(), (chosen == batch.counterfactual).tolist()
                rows += [
                    (pair.fact, band.first, band.last, band.role, pair.donor is not None, *outcome)
                    for pair, *outcome in zip(batch.pairs, clean, correct, donor, strict=True)
                ]
    columns = ["fact", "first", "last", "role", "has_donor", "clean", "correct", "donor"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def ablated_logits(
    model: Model,
    batch: PairBatch,
    donors: Mapping[Place, Tensor],
    role: AblationRole,
    kept: Mapping[Place, Tensor] | None = None,
) -> Float[Tensor, "batch d_vocab"]:
    """Logits of the clean run in which the places write what they write on the donor's run; `kept` stays as given."""

    def replacement(donor: Tensor) -> Change:
        return lambda value: batch.put(value, donor, _TOKENS[role])

    def held(own: Tensor) -> Change:
        return lambda value: own

    changes = {place: replacement(donor) for place, donor in donors.items()}
    with hooked(model, change=changes | {place: held(own) for place, own in (kept or {}).items()}):
        return last_logits(model, batch.clean)
