"""Does a model look facts up at the subject? Which MLPs do, whether they suffice, and when the answer is fetched.

Facts are asked in templates that state the subject before the relation: at most one word before the subject, and
something after it, so that what the band of MLPs writes there cannot depend on the relation.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from mechunlearn.facts import Fact
from mechunlearn.localize.attention_knockout import knock_out_attention
from mechunlearn.localize.bands import Band, ablate_bands
from mechunlearn.metrics import known_facts
from mechunlearn.models import Model


class NothingToMeasure(ValueError):
    """The model knows too little, or is too shallow."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mechanism:
    """What was measured, one row per fact and intervention."""

    band: Band
    """Chosen on one half of the facts; everything else here is measured on the other half."""
    choice: pd.DataFrame
    """The half that chose: first, last, role, clean, correct, donor as shares."""
    ablations: pd.DataFrame
    """intervention (the names of `neighbours`), fact, relation, and the columns of `bands.ablate_bands`."""
    knockouts: pd.DataFrame
    """Attention from the last token to the subject blocked in layers first..last: fact, relation, correct."""


def subject_first(fact: Fact, seed: int = 0) -> Fact | None:
    """The fact with one of its templates in which the subject comes before the relation as prompt; None if none."""
    usable = [
        template
        for template in (fact.prompt, *fact.paraphrases)
        if len(template.partition("{}")[0].split()) <= 1 and template.partition("{}")[2].strip()
    ]
    if not usable:
        return None
    return replace(fact, prompt=random.Random(f"{seed}|{fact.key}").choice(usable))


def measure_mechanism(model: Model, facts: Sequence[Fact], *, batch_size: int = 64, seed: int = 0) -> Mechanism:
    """Find the band of MLPs that looks the facts up at their subjects, and measure what depends on it.

    The band, layer 0 excluded, is the one with the largest difference between its own cost at the subject and the
    largest cost of as many MLPs right before (from layer 1 on) or right after it, or of all that are left on that side;
    on one side at least there must be as many. Half of the facts choose it, the other half measures, so that the
    choice does not flatter the measurement.

    Args:
        facts: those that the model does not know in the template asked, or that have no template with the subject
            first, are left out.

    Raises:
        NothingToMeasure: fewer than 8 usable facts, or a model of fewer than 3 layers.
    """
    if model.n_layers < 3:
        raise NothingToMeasure(f"mechanism: got a model of {model.n_layers} layers, allowed: 3 or more")
    asked = [changed for fact in facts if (changed := subject_first(fact, seed)) is not None]
    known = list(known_facts(model, asked))
    random.Random(seed).shuffle(known)
    if len(known) < 8:
        raise NothingToMeasure(
            f"mechanism: the model knows {len(known)} of {len(asked)} facts in a template with the subject first "
            "(e.g. '{} plays the sport of'), needs 8; give facts that it knows"
        )
    choosing, measuring = known[::2], known[1::2]
    options = {"batch_size": batch_size, "seed": seed}
    bands = _candidates(model.n_layers)
    beside = [
        b for band in bands for b in neighbours(band, model.n_layers).values() if b.role == "subject" and not b.held
    ]
    choice = ablate_bands(model, choosing, list(dict.fromkeys((*bands, *beside))), **options)
    kinds = dict.fromkeys(("clean", "correct", "donor"), "mean")
    shares = choice.groupby(["first", "last", "role"], as_index=False).agg(kinds)
    band = _best(shares, bands, model.n_layers)
    others = neighbours(band, model.n_layers)
    measured = ablate_bands(model, measuring, list(others.values()), **options)
    parts = []
    for name, other in others.items():
        same = (measured["first"] == other.first) & (measured["last"] == other.last) & (measured["role"] == other.role)
        parts.append(measured.loc[same].assign(intervention=name))
    ablations = pd.concat(parts, ignore_index=True)
    knockouts = pd.concat(
        [
            pd.DataFrame(
                {"first": first, "last": last, "fact": range(len(measuring)),
                 "correct": knock_out_attention(model, measuring, range(first, last + 1), **options)}
            )
            for first, last in _cuts(model.n_layers)
        ],
        ignore_index=True,
    )  # fmt: skip
    relations = [fact.relation for fact in measuring]
    for frame in (ablations, knockouts):
        frame["relation"] = [relations[i] for i in frame["fact"]]
    return Mechanism(band=band, choice=shares, ablations=ablations, knockouts=knockouts)


def neighbours(band: Band, n_layers: int) -> dict[str, Band]:
    """The band, as many MLPs right before it (from layer 1) and right after it, and the band at the last token.

    Where fewer MLPs are left on a side, all that are; a side without any is missing. Beside the band stands MLP 0, with
    what the band writes held: it carries the name's tokens to the band, and this is what it does by other ways.
    """
    size = len(band.layers)
    listed = {
        "band": band,
        "band at the last token": replace(band, role="last"),
        "MLP 0 beside the band": Band(first=0, last=0, held=band.layers),
    }
    if band.first > 1:
        listed["earlier"] = Band(first=max(1, band.first - size), last=band.first - 1)
    if band.last < n_layers - 1:
        listed["later"] = Band(first=band.last + 1, last=min(n_layers - 1, band.last + size))
    return listed


def _candidates(n_layers: int) -> list[Band]:
    """Bands that leave room for as many MLPs on one side; of every size in small models, of three in deep ones."""
    half = (n_layers - 1) // 2
    sizes = range(1, half + 1) if n_layers <= 12 else sorted({n_layers // 8, n_layers // 4, half})
    places = [(first, first + size - 1) for size in sizes for first in range(1, n_layers - size + 1)]
    return [
        Band(first=first, last=last)
        for first, last in places
        if max(first - 1, n_layers - 1 - last) >= last - first + 1
    ]


def _cuts(n_layers: int) -> list[tuple[int, int]]:
    """Spans of layers whose attention is blocked: none (0, -1), from the start up to each, from each to the end."""
    last = n_layers - 1
    return [(0, -1), *((0, i) for i in range(last)), *((i, last) for i in range(last + 1))]


def _best(shares: pd.DataFrame, bands: Sequence[Band], n_layers: int) -> Band:
    lost = shares["clean"] - shares["correct"]
    cost = dict(zip(zip(shares["first"], shares["last"], strict=True), lost, strict=True))

    def contrast(band: Band) -> float:
        beside = [other for name, other in neighbours(band, n_layers).items() if name in ("earlier", "later")]
        return cost[band.first, band.last] - max(cost[other.first, other.last] for other in beside)

    return max(bands, key=lambda band: (round(contrast(band), 3), -len(band.layers)))
