"""The layers where a fact becomes readable at its subject: fact lookup, found by probes with controls."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.models import Model, all_components, has_parallel_blocks
from mechunlearn.probes import (
    held_out_probabilities,
    is_correct,
    online_bits,
    residual_features,
    shuffled_labels,
    subject_token_counts,
)

Score = Literal["accuracy", "compression"]
Readable = Float[np.ndarray, "layer fact"]
_GAIN: Mapping[Score, str] = {
    "accuracy": "readable facts over the MLP's block",
    "compression": "saved share of the answers' code length over the component",
}


@LOCALIZERS.register("fact_lookup_probe", source="Nanda et al. 2023, Fact Finding; Guo et al. 2024, arXiv:2410.12949")
def fact_lookup_probe(
    model: Model,
    facts: Sequence[Fact],
    *,
    twin: Model | None = None,
    score: Score = "accuracy",
    site: Literal["subject_last", "subject_mean"] = "subject_last",
    folds: Annotated[int, Field(ge=2)] = 5,
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    draws: Annotated[int, Field(ge=1)] = 3,
    regularization: Annotated[float, Field(gt=0)] = 10.0,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Score each MLP by how much more of the attribute can be read after its block than before, at the subject.

    above(l) = readable(l) - max(majority, name tokens, twin(l)), score(m_l) = above(l + 1) - above(l), where layer 0 is
    the stream before the first block and l + 1 the stream after block l. Readable is, by `score`:
    accuracy: that of a multinomial logistic regression on entities it has not seen;
    compression: 1 - bits / log2 K, bits being what a fact's answer, one of K, costs in the online code of
    `probes.online_code`. Here attention and MLP of a block are scored apart, by the stream between them, unless the
    blocks are parallel (GPT-NeoX).
    Both for each relation by itself, averaged over all facts.

    Shapes: the result is [fact component 1]; a fact's accuracy is 0 or 1.
    Sign and units: share of facts in [-2, 2], or of the code length without features, at most 1 in all. Positive: the
        attribute becomes readable in this component. The scores of all components sum to what is readable at the end
        and not at the start. A fact in the code's first block (an eighth) costs log2 K everywhere, so it scores 0 but
        for the baselines.

    Args:
        twin: a model that never knew the facts; what its stream gives away is no lookup.
        score: "compression" also sees what is already read before and becomes easier to read, and answers without
            being decided by a few facts at the border; it has no folds.
        site: the subject's last token, or the mean over its tokens; the role of the scores is "subject_last" for both.
        folds: parts of the entities; each is held out once (accuracy).
        margin: how far above every baseline the readable share must come for a band to exist.
        draws: sets of control labels (labels shuffled over entities) that selectivity is taken against.
        regularization: see `probes.fit_probe`.

    Returns:
        Scores whose notes hold `curve` (for compression: `code`) with the readable share (under the score's name),
        baseline, majority (for compression: a code that sees no features), bag, twin, control and selectivity by
        stream, the same by relation, and `band`: {"first", "last"} MLP layer between which the readable share above
        the baseline climbs from the margin to 90 % of its maximum, or "none", with `band_reason`.

    Raises:
        ValueError: too few subjects per answer to hold some out, a single answer, a twin with other layers.

    Differs from the source: held-out entities, standardised features and a rule for the band instead of the eye; the
        block's attention counts towards its MLP (accuracy); gains in compression instead of its level (Voita & Titov).
    Source: Nanda et al. 2023, "Fact Finding"; Guo et al. 2024, arXiv:2410.12949; compression: Voita & Titov 2020,
        arXiv:2003.12298.
    """
    if twin is not None and twin.n_layers != model.n_layers:
        raise ValueError(f"fact_lookup_probe: got a twin of {twin.n_layers} layers, allowed: {model.n_layers}")
    mid = score == "compression" and not has_parallel_blocks(model)
    components = all_components(model, ("attention", "mlp") if mid else ("mlp",))
    per_fact = np.zeros((len(facts), len(components), 1))
    curves: dict[str, dict[str, list[float]]] = {}
    members = {r: [i for i, f in enumerate(facts) if f.relation == r] for r in dict.fromkeys(f.relation for f in facts)}
    if not members:
        raise ValueError("fact_lookup_probe: got no facts, allowed: at least two per answer")
    fit = {"folds": folds, "regularization": regularization, "seed": seed}
    for relation, rows in members.items():
        group = [facts[i] for i in rows]
        try:
            readable, curve = _probe_relation(model, twin, group, score, mid, site, draws, batch_size, fit)
        except ValueError as error:
            raise ValueError(f"fact_lookup_probe, relation '{relation}': {error}") from None
        above = readable - np.array(curve["baseline"])[:, None]
        per_fact[rows, :, 0] = np.diff(above, axis=0).T
        curves[relation] = curve
    shares = {relation: len(rows) / len(facts) for relation, rows in members.items()}
    names = next(iter(curves.values()))
    mean = {n: np.sum([shares[r] * np.array(c[n]) for r, c in curves.items()], axis=0).tolist() for n in names}
    name, step = ("curve", 1) if score == "accuracy" else ("code", 2 if mid else 1)

    def band_of(curve: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        above = (np.array(curve[score]) - np.array(curve["baseline"]))[::step]
        band, reason = climbing_band(above, margin, score)
        return {"band": {"first": band[0], "last": band[1]} if band else "none", "band_reason": reason}

    return ComponentScores(
        method="fact_lookup_probe",
        metric=f"probe {score} above the best baseline",
        sign=f"gain in {_GAIN[score]}; positive: the attribute becomes readable there",
        components=components,
        roles=("subject_last",),
        per_fact=per_fact,
        options={"score": score, "site": site, "margin": margin, "draws": draws, "batch_size": batch_size, **fit},
        facts_sha256=hash_facts(facts),
        notes={
            name: mean,
            "relations": {relation: {name: curve, **band_of(curve)} for relation, curve in curves.items()},
            "twin": twin.name if twin else None,
            **band_of(mean),
        },
    )


def _probe_relation(
    model: Model,
    twin: Model | None,
    facts: Sequence[Fact],
    score: Score,
    mid: bool,
    site: Literal["subject_last", "subject_mean"],
    draws: int,
    batch_size: int,
    fit: Mapping[str, Any],
) -> tuple[Readable, dict[str, list[float]]]:
    """How far each fact can be read from each stream, and all curves of one relation."""
    labels, subjects = [fact.target_true for fact in facts], [fact.subject for fact in facts]

    def streams_of(model: Model) -> Float[np.ndarray, "fact layer d_model"]:
        return residual_features(model, facts, "prompt", (site,), mid=mid, batch_size=batch_size)[site]

    def read(features: Float[np.ndarray, "fact d_feature"], labels: Sequence[str], **given: Any) -> np.ndarray:
        if score == "accuracy":
            return is_correct(held_out_probabilities(features, labels, subjects, **{**fit, **given}), labels)
        options = {name: value for name, value in {**fit, **given}.items() if name != "folds"}
        bits, _ = online_bits(features, labels, subjects, classes=classes, **options)
        return 1 - bits / np.log2(len(classes))

    def by_layer(features: Float[np.ndarray, "fact layer d_model"], labels: Sequence[str]) -> Readable:
        return np.stack([read(features[:, i], labels) for i in range(features.shape[1])])

    classes = sorted(set(labels))
    features = streams_of(model)
    readable = by_layer(features, labels)
    counts = subject_token_counts(model, facts)
    # counts are 0 or 1 already, and a weaker penalty gives this baseline its best chance
    from_name = read(counts, labels, regularization=1.0, standardize=False).mean()
    majority = max(labels.count(label) for label in classes) / len(labels)
    if score == "compression":
        majority = read(np.zeros((len(facts), 1)), labels).mean()
    seeds = np.random.default_rng(fit["seed"]).integers(2**31, size=draws)
    shuffled = [shuffled_labels(labels, subjects, seed=int(s)) for s in seeds]
    control = np.mean([by_layer(features, control_labels).mean(axis=1) for control_labels in shuffled], axis=0)
    level = readable.mean(axis=1)
    curve = {
        score: level,
        "majority": np.full_like(level, majority),
        "bag": np.full_like(level, from_name),
        "control": control,
        "selectivity": level - control,
    }
    if twin is not None:
        curve["twin"] = by_layer(streams_of(twin), labels).mean(axis=1)
    curve["baseline"] = np.max([curve[name] for name in ("majority", "bag", "twin") if name in curve], axis=0)
    return readable, {name: values.tolist() for name, values in curve.items()}


def climbing_band(
    above: Float[np.ndarray, " layer"], margin: float, what: str = "accuracy"
) -> tuple[tuple[int, int] | None, str]:
    """First and last MLP between which a curve over layers (0 = before the first block) climbs; and why.

    The first MLP is the one after whose block the curve first exceeds the margin, the last the one after whose block
    it first reaches 90 % of its maximum. None if the curve never exceeds the margin, or is there before any MLP.
    """
    highest = float(above.max())
    if highest <= margin:
        return None, f"the {what} is never more than {margin} above the best baseline (at most {highest:.3f})"
    if above[0] >= 0.9 * highest:
        return None, "the attribute is readable before the first block"
    first = int(np.argmax(above > margin))
    last = int(np.argmax(above >= 0.9 * highest))
    return (max(first - 1, 0), last - 1), f"climbs from above {margin} to 90 % of {highest:.3f} above the best baseline"
