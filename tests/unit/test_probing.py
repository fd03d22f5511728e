"""What probing notes about code lengths: they are those of the features, and they decide nothing."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mechunlearn.attack import probing
from mechunlearn.facts import Fact, FactSet, FactSplit, split_facts
from mechunlearn.models import Model
from mechunlearn.probes import CodeLength, Site, online_code, residual_features

LAYERS: dict[Site, int] = {"subject_last": 1, "last": 2}  # of three
QUICK = {"max_steps": 15}


def code_of(model: Model, facts: tuple[Fact, ...], site: Site, classes: set[str]) -> CodeLength:
    features = residual_features(model, facts, sites=[site])[site][:, LAYERS[site]]
    labels, groups = [fact.target_true for fact in facts], [fact.subject for fact in facts]
    return online_code(features, labels, groups, classes=sorted(classes), max_steps=15)


def parts_of(split: FactSplit, relation: str) -> dict[str, tuple[Fact, ...]]:
    known = (*split.forget_shown, *split.attack_dev)
    return {
        "retain_train": tuple(fact for fact in split.retain_train if fact.relation == relation),
        "forget_known": tuple(fact for fact in known if fact.relation == relation),
    }


@pytest.fixture(scope="module")
def two_relations(tiny_facts: FactSet) -> FactSplit:
    people = list(dict.fromkeys(fact.subject for fact in tiny_facts))[:24]
    return split_facts(tiny_facts, tiny_facts.where(lambda fact: fact.subject in people), seed=0)


def test_the_code_lengths_are_those_of_the_features_and_add_up_over_relations(
    tiny_model: Callable[..., Model], two_relations: FactSplit
) -> None:
    model = tiny_model()
    # answers that only retained facts have are among the classes of the forgotten ones, too
    fewer = {part: tuple(fact for fact in getattr(two_relations, part) if fact.target_true not in ("red", "Oslo"))
             for part in ("forget_shown", "attack_dev")}  # fmt: skip
    split = replace(two_relations, **fewer)
    assert split.attack_dev
    records = probing(model, split, **QUICK).notes["mdl"]
    assert json.loads(json.dumps(records)) == records
    assert {(r["part"], r["site"], r["layer"]) for r in records} == {
        (part, site, layer) for part in ("retain_train", "forget_known") for site, layer in LAYERS.items()
    }
    for record in records:
        codes = []
        for relation in ("colour", "city"):
            parts = parts_of(split, relation)
            classes = {fact.target_true for facts in parts.values() for fact in facts}
            codes.append(code_of(model, parts[record["part"]], record["site"], classes))
        uniform = sum(code.uniform_bits for code in codes)
        assert record["n"] == sum(sum(code.rows) for code in codes)
        assert record["bits"] == pytest.approx(sum(sum(code.bits) for code in codes), rel=1e-4)
        assert record["compression"] == pytest.approx(uniform / record["bits"], rel=1e-4)
        control = uniform / sum(sum(code.control_bits) for code in codes)
        assert record["control_compression"] == pytest.approx(control, rel=1e-4)
        assert record["selectivity"] == pytest.approx(record["compression"] - record["control_compression"])


def test_code_lengths_decide_nothing_and_see_no_hidden_fact(
    tiny_model: Callable[..., Model], tiny_split: FactSplit
) -> None:
    model = tiny_model()
    noted = probing(model, tiny_split, **QUICK)
    plain = probing(model, tiny_split, mdl=False, **QUICK)
    assert "mdl" not in plain.notes
    assert noted.rows.equals(plain.rows)
    assert (noted.chosen, noted.health) == (plain.chosen, plain.health)
    other = replace(tiny_split, forget_hidden=tiny_split.forget_hidden[:3])
    assert probing(model, other, **QUICK).notes["mdl"] == noted.notes["mdl"]


def test_what_is_written_in_the_residual_stream_takes_fewer_bits(
    tiny_model: Callable[..., Model], tiny_facts: FactSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delta I: answers written into the features of a random model make the code of both parts shorter."""
    colours = [fact for fact in tiny_facts if fact.relation == "colour"]
    names = [f"{a.subject} {b.subject}" for a in colours[:12] for b in colours[:12]]
    many = [
        replace(colours[i % 4], subject=name, target_true=colours[0].choices[i % 4]) for i, name in enumerate(names)
    ]
    split = split_facts(FactSet(name="many", facts=tuple(many)), many[:72], seed=0)
    options = {"trained_on": ("retain_train",), **QUICK}
    nothing = probing(tiny_model(), split, **options).notes["mdl"]

    def telling(model: Model, facts: tuple[Fact, ...], **options) -> dict[Site, np.ndarray]:
        found = residual_features(model, facts, **options)
        for features in found.values():
            for i, fact in enumerate(facts):
                features[i, :, fact.choices.index(fact.target_true)] += 20.0
        return found

    monkeypatch.setitem(probing.__globals__, "residual_features", telling)
    written = probing(tiny_model(), split, **options).notes["mdl"]
    for before, after in zip(nothing, written, strict=True):
        assert after["compression"] > before["compression"] + 0.2
        assert after["selectivity"] > 0.2 > before["selectivity"]


def test_a_relation_that_nothing_retained_has_is_coded_for_the_forgotten_alone(
    tiny_model: Callable[..., Model], tiny_split: FactSplit
) -> None:
    lone = replace(tiny_split, retain_train=tuple(f for f in tiny_split.retain_train if f.relation != "colour"))
    records = probing(tiny_model(), lone, **QUICK).notes["mdl"]
    assert {record["part"] for record in records} == {"forget_known"}
