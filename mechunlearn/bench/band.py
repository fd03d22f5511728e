"""How well every localizer agrees with the band of MLPs that ablation shows to look the facts up."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from mechunlearn.bench.mechanism import measure_mechanism
from mechunlearn.bench.planted_settings import LocalizerSettings
from mechunlearn.bench.ranks import random_metrics, ranking_metrics, values_of_kind
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.agreement import agreement
from mechunlearn.localize.resample_ablation import resample_ablation
from mechunlearn.models import Model

# pandas has no complete types
# pyright: standard


def bench_band(
    model: Model, facts: Sequence[Fact], retain: Sequence[Fact], lines: Sequence[LocalizerSettings], *,
    twin: Model | None = None, max_facts: int = 96, seed: int = 0,
    on_progress: Callable[[str, float, float], None] = lambda text, done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """Score the facts by every localizer and compare its MLPs with the causally established band.

    The band is that of `bench.mechanism`: neighbouring MLPs whose joint ablation at the subject takes the answers away,
    while as many before or after it do not. It is found on all the facts.

    Args:
        max_facts: what the localizers get, drawn from the facts if there are more; of the drawn, those whose answer no
            other has are left out, for a probe could not hold one out.
        retain, twin: for the methods that take them.

    Returns:
        One row a localizer: its three highest MLPs, the rank metrics with the band as truth, Spearman's correlation
        with the exact effect of each MLP at the subject, seconds, and `error`, why it could not score. First row:
        a random ranking, in expectation.

    Raises:
        NothingToMeasure: too few facts that the model knows, or too few layers.
    """
    band = measure_mechanism(model, facts, seed=seed).band
    truth = [Component("mlp", layer) for layer in band.layers]
    facts = _drawn(facts, max_facts, seed)
    exact = resample_ablation(model, facts, seed=seed).at("subject")
    name = f"m{band.first} to m{band.last}"
    rows: list[Mapping[str, Any]] = [
        {"localizer": "random", "band": name, "error": ""} | random_metrics(model.n_layers, truth)
    ]
    for done, line in enumerate(lines):
        on_progress(f"localizing: {line.name}", done, len(lines))
        started = time.monotonic()
        row: dict[str, Any] = {"localizer": line.name, "band": name, "error": ""}
        try:
            method = LOCALIZERS.get(line.method)
            given = method.wanted(twin=twin, retain=retain)
            scores = method.function(model, facts, **method.validate(line.options), **given)
        except ValueError as error:  # a method that this model or these facts do not suit
            rows.append(row | {"error": str(error)})
            continue
        rows.append(row | _compared(scores, line, truth, exact) | {"seconds": time.monotonic() - started})
    return pd.DataFrame(rows)


def _drawn(facts: Sequence[Fact], most: int, seed: int) -> list[Fact]:
    if len(facts) <= most:
        return list(facts)
    drawn = random.Random(seed).sample(facts, most)
    alike = Counter((fact.relation, fact.target_true) for fact in drawn)
    return [fact for fact in drawn if alike[fact.relation, fact.target_true] > 1]


def _compared(
    scores: ComponentScores, line: LocalizerSettings, truth: Sequence[Component], exact: ComponentScores
) -> dict[str, Any]:
    mlps = values_of_kind(scores, "mlp", line.reduce)
    if not set(truth) <= set(mlps):
        return {"error": "scores no MLPs"}
    highest = sorted(mlps, key=lambda component: -mlps[component])[:3]
    found = ranking_metrics(mlps, truth)
    constant = len(set(mlps.values())) == 1
    same = float("nan") if constant else agreement(scores, exact)["spearman"]
    return {"highest": " ".join(map(str, highest)), **found, "Spearman with exact": same}
