"""Probing: read the answers off the residual stream, whatever the model says."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import Field

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult, Health, fact_rows
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.probes import CodeLength, Probe, Site, fit_probe, online_code, residual_features
from mechunlearn.prompts import candidates

TrainedOn = Literal["retain_train", "forget_shown"]
Features = Mapping[Site, Float[np.ndarray, "fact layer d_model"]]


@ATTACKS.register("probing", source="Alain & Bengio 2016, arXiv:1610.01644; Guo et al. 2024, arXiv:2410.12949")
def probing(
    model: Model,
    split: FactSplit,
    *,
    sites: Annotated[Sequence[Site], Field(min_length=1)] = ("subject_last", "last"),
    trained_on: Annotated[Sequence[TrainedOn], Field(min_length=1)] = ("retain_train", "forget_shown"),
    max_train: Annotated[int, Field(ge=2)] = 320,
    regularization: Annotated[float, Field(gt=0)] = 10.0,
    max_steps: Annotated[int, Field(ge=1)] = 60,
    mdl: bool = True,
    drop_targets: bool = False,
    seed: int = 0,
) -> AttackResult:
    """Train linear probes for the answer at every layer and site; score them on the unseen `forget_hidden`.

    One probe a relation, trained on facts of that relation: retained ones (is the answer still stored the way others
    are?) and, as a second setting, forgotten ones that the attacker knows (is it stored in a new way?). Layer, site and
    training set are chosen by the mean P(true | candidates) on `attack_dev` among the settings whose probes fit their
    own training facts (>= 90%). The model is not changed, so nothing else can break.

    Args:
        trained_on: a relation that has fewer than two answers in one part uses the other.
        max_train: training facts a relation; more are left out by a seeded draw.
        regularization: of the logistic regression, see `fit_probe`.
        max_steps: of its solver.
        mdl: also note how few bits the answers take given the features, see `_Bench.code_lengths`; decides nothing.
        drop_targets: leave `target_new` out of the candidates (for injections, on edited model and twin alike).

    Raises:
        ValueError: a relation has no facts with two different answers to train on, or a part is empty.

    Differs from the source: P(true) is taken among the fact's candidates, and the layer is chosen on a dev part.
    Source: Alain & Bengio 2016, arXiv:1610.01644.
    """
    options = {
        "sites": list(sites), "trained_on": list(trained_on), "max_train": max_train, "regularization": regularization,
        "max_steps": max_steps, "mdl": mdl, "drop_targets": drop_targets,
    }  # fmt: skip
    if not split.attack_dev:
        raise ValueError("probing: attack_dev is empty; split with a dev part")
    bench = _Bench(model=model, split=split, sites=tuple(sites), max_train=max_train, seed=seed,
                   regularization=regularization, max_steps=max_steps)  # fmt: skip
    dev_features = residual_features(model, split.attack_dev, sites=sites)
    settings: list[tuple[TrainedOn, Site, int]] = [
        (part, site, layer) for part in trained_on for site in sites for layer in range(model.n_layers + 1)
    ]
    dev: dict[tuple[TrainedOn, Site, int], float] = {}
    fitted: dict[tuple[TrainedOn, Site, int], float] = {}
    for part, site, layer in settings:
        scores, fitted[part, site, layer] = bench.scores(
            split.attack_dev, dev_features, part, site, layer, drop_targets
        )
        dev[part, site, layer] = float(scores["p_true"].to_numpy().mean())
    limit = Health().least_fitted
    chosen = max(settings, key=lambda setting: (fitted[setting] >= limit, dev[setting]))
    part, site, layer = chosen
    name = f"{part} {site} layer {layer}"
    held_out = [f for f in split.retain_test if f.relation in {fact.relation for fact in split.attack_dev}][:max_train]
    notes: dict[str, object] = {"dev_p_true": {f"{p} {s} layer {n}": value for (p, s, n), value in dev.items()}}
    if held_out:
        features = residual_features(model, held_out, sites=[site])
        notes["retain_test_accuracy"] = float(
            bench.scores(held_out, features, part, site, layer, False)[0]["correct"].to_numpy().mean()
        )
    if mdl:
        notes["mdl"] = bench.code_lengths()
    hidden = split.forget_hidden  # first access: everything is chosen
    if not hidden:
        raise ValueError("probing: forget_hidden is empty; there is nothing to recover")
    features = residual_features(model, hidden, sites=sites)
    rows = [
        fact_rows(
            hidden, bench.scores(hidden, features, part, s, n, drop_targets)[0],
            part="forget_hidden", setting=f"{part} {s} layer {n}",
        )
        for s in sites for n in range(model.n_layers + 1)
    ]  # fmt: skip
    before = score_facts(model, hidden, drop_targets=drop_targets)
    return AttackResult(
        attack="probing",
        access="activations",
        decides=True,
        rows=pd.concat(rows, ignore_index=True),
        before=fact_rows(hidden, before, part="forget_hidden", setting="before"),
        chosen=name,
        health=Health(fitted=fitted[chosen]),
        options=options,
        seed=seed,
        model=model.name,
        facts_sha256=split.sha256,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Training features and fitted probes, each made once, when first needed."""

    model: Model
    split: FactSplit
    sites: tuple[Site, ...]
    max_train: int
    regularization: float
    max_steps: int
    seed: int
    _features: dict[tuple[str, str], tuple[list[Fact], Features]] = field(default_factory=dict)
    _probes: dict[tuple[str, str, str, int], tuple[Probe, float]] = field(default_factory=dict)

    def scores(
        self, facts: Sequence[Fact], features: Features, part: str, site: Site, layer: int, drop_targets: bool
    ) -> tuple[pd.DataFrame, float]:
        """P(true | candidates) and correctness of each fact, and the lowest training accuracy among the probes used."""
        probes = {relation: self.probe(relation, part, site, layer) for relation in {fact.relation for fact in facts}}
        p_true, correct, top = np.zeros(len(facts)), np.zeros(len(facts), dtype=bool), [""] * len(facts)
        for relation, (probe, _) in probes.items():
            at = [i for i, fact in enumerate(facts) if fact.relation == relation]
            for i, p in zip(at, probe.probabilities(features[site][at, layer]), strict=True):
                p_true[i], correct[i], top[i] = _among_candidates(
                    facts[i], dict(zip(probe.classes, p, strict=True)), drop_targets
                )
        return pd.DataFrame({"p_true": p_true, "correct": correct, "top": top}), min(fit for _, fit in probes.values())

    def probe(self, relation: str, part: str, site: Site, layer: int) -> tuple[Probe, float]:
        """The relation's probe and its accuracy on its own training facts."""
        key = relation, part, site, layer
        if key not in self._probes:
            facts, features = self.training(relation, part)
            x, labels = features[site][:, layer], [fact.target_true for fact in facts]
            probe = fit_probe(x, labels, regularization=self.regularization, max_steps=self.max_steps, seed=self.seed)
            fitted = np.mean([a == b for a, b in zip(probe.predict(x), labels, strict=True)])
            self._probes[key] = probe, float(fitted)
        return self._probes[key]

    def training(self, relation: str, part: str) -> tuple[list[Fact], Features]:
        """Training facts of a relation and their features; the other part stands in where this one has too few."""
        other = "forget_shown" if part == "retain_train" else "retain_train"
        for name in (part, other):
            facts = [fact for fact in getattr(self.split, name) if fact.relation == relation]
            if len(Counter(fact.target_true for fact in facts)) > 1:
                return self._sampled((relation, name), facts)
        raise ValueError(
            f"probing: relation '{relation}' has no two answers to train on in retain_train or forget_shown; "
            "give more facts of it, or leave this attack out"
        )

    def code_lengths(self) -> list[dict[str, float | str]]:
        """Online code lengths of retained facts and of the forgotten ones the attacker knows.

        Each site has one fixed layer, so that model and twin can be compared (Delta I is the difference of their
        compressions): the subject's tokens halfway up, where attributes are gathered, the last token at three quarters,
        after they were fetched (Geva et al. 2023, arXiv:2304.14767). All layers would cost twice the attack itself.
        Relations are coded one by one, among all answers of theirs that the attacker knows; bits add up.

        Returns:
            One record a (part, site, layer): n, bits, compression, control_compression, selectivity. Part
            "forget_known" is `forget_shown` and `attack_dev`. See `probes.online_code`.
        """
        split, n_layers = self.split, self.model.n_layers
        known = (*split.forget_shown, *split.attack_dev)
        found: dict[tuple[str, Site, int], list[CodeLength]] = {}
        for relation in sorted({fact.relation for fact in known}):
            parts = {
                "retain_train": [fact for fact in split.retain_train if fact.relation == relation],
                "forget_known": [fact for fact in known if fact.relation == relation],
            }
            classes = {fact.target_true for facts in parts.values() for fact in facts}
            for part, facts in parts.items():
                if not facts or len(classes) < 2:
                    continue
                facts, features = self._sampled((relation, part), facts)
                labels, groups = [fact.target_true for fact in facts], [fact.subject for fact in facts]
                for site in self.sites:
                    layer = 3 * n_layers // 4 if site == "last" else n_layers // 2
                    code = online_code(
                        features[site][:, layer], labels, groups, classes=tuple(classes),
                        regularization=self.regularization, max_steps=self.max_steps, seed=self.seed,
                    )  # fmt: skip
                    found.setdefault((part, site, layer), []).append(code)
        return [
            {"part": part, "site": site, "layer": layer} | _summed(codes)
            for (part, site, layer), codes in sorted(found.items())
        ]

    def _sampled(self, key: tuple[str, str], facts: list[Fact]) -> tuple[list[Fact], Features]:
        """At most `max_train` of the facts, and their features."""
        if key not in self._features:
            if len(facts) > self.max_train:
                facts = random.Random(self.seed).sample(facts, self.max_train)
            self._features[key] = facts, residual_features(self.model, facts, sites=self.sites)
        return self._features[key]


def _summed(codes: Sequence[CodeLength]) -> dict[str, float]:
    """Code lengths of several relations as one."""
    uniform, bits = sum(code.uniform_bits for code in codes), sum(sum(code.bits) for code in codes)
    control = uniform / sum(sum(code.control_bits) for code in codes)
    return {
        "n": sum(sum(code.rows) for code in codes), "bits": bits, "compression": uniform / bits,
        "control_compression": control, "selectivity": uniform / bits - control,
    }  # fmt: skip


def _among_candidates(fact: Fact, p: Mapping[str, float], drop_targets: bool) -> tuple[float, bool, str]:
    """P(true), whether it is highest, and the best answer, over the fact's candidates; unseen answers get nothing."""
    among = {answer: p.get(answer, 0.0) for answer in candidates(fact, drop_targets=drop_targets)}
    total = sum(among.values())
    if total <= 0:
        return 1 / len(among), False, ""
    top = max(among, key=lambda answer: among[answer])
    true = among.pop(fact.target_true)
    return min(true / total, 1.0), true > max(among.values(), default=0.0), top
