"""Probes: against sklearn's own pipeline, entity-disjoint, at chance on shuffled labels."""

from collections import Counter
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechunlearn.facts import FactSet
from mechunlearn.models import Model
from mechunlearn.probes import (
    entity_folds,
    fit_probe,
    held_out_probabilities,
    is_correct,
    online_code,
    residual_features,
    shuffled_labels,
    subject_token_counts,
)
from mechunlearn.prompts import render, token_roles


def clusters(n: int = 120, classes: int = 4, noise: float = 0.5) -> tuple[np.ndarray, list[str], list[str]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=n)
    features = rng.normal(size=(classes, 10))[labels] * 3 + noise * rng.normal(size=(n, 10)) + 5
    return features, [f"c{i}" for i in labels], [f"s{i}" for i in range(n)]


@pytest.mark.parametrize("classes", [2, 4])
def test_a_probe_equals_sklearns_pipeline(classes: int) -> None:
    features, labels, _ = clusters(classes=classes, noise=3.0)
    probe = fit_probe(features, labels, regularization=4.0)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.25, max_iter=1000)).fit(features, labels)
    np.testing.assert_allclose(probe.probabilities(features), reference.predict_proba(features), atol=1e-6)
    assert list(probe.predict(features)) == reference.predict(features).tolist()
    np.testing.assert_allclose(probe.probabilities(features).sum(axis=1), 1)


def test_a_constant_feature_changes_nothing() -> None:
    features, labels, _ = clusters()
    constant = np.concatenate([features, np.full((len(features), 1), 0.1)], axis=1)
    expected = fit_probe(features, labels).probabilities(features)
    np.testing.assert_allclose(fit_probe(constant, labels).probabilities(constant), expected, atol=1e-6)


def test_no_entity_is_in_two_folds_and_every_fold_has_every_class() -> None:
    labels = ["a", "a", "b", "b", "c", "c"] * 5
    groups = [f"s{i // 2}" for i in range(30)]
    fold = entity_folds(labels, groups, folds=3, seed=1)
    for group in set(groups):
        assert len({fold[i] for i, g in enumerate(groups) if g == group}) == 1
    for held_out in range(3):
        assert {labels[i] for i in range(30) if fold[i] == held_out} == {"a", "b", "c"}
    assert fold.tolist() == entity_folds(labels, groups, folds=3, seed=1).tolist()
    assert fold.tolist() != entity_folds(labels, groups, folds=3, seed=2).tolist()


def test_readable_labels_are_read_and_shuffled_ones_are_not() -> None:
    features, labels, groups = clusters()
    assert is_correct(held_out_probabilities(features, labels, groups), labels).mean() > 0.95
    control = shuffled_labels(labels, groups, seed=0)
    assert sorted(control) == sorted(labels)
    assert is_correct(held_out_probabilities(features, control, groups), control).mean() < 0.45


def test_memorised_entities_do_not_count() -> None:
    # each entity has its own direction and an arbitrary label, over three rows: random splits would score 1
    rng = np.random.default_rng(1)
    groups = [f"s{i // 3}" for i in range(180)]
    labels = [("x", "y")[i] for i in rng.integers(2, size=60) for _ in range(3)]
    features = np.repeat(rng.normal(size=(60, 40)), 3, axis=0)
    assert is_correct(held_out_probabilities(features, labels, groups, folds=4), labels).mean() < 0.7


def test_too_few_entities_is_one_line() -> None:
    features, labels, groups = clusters(n=12, classes=2)
    for bad, folds in (([*labels[:-1], "rare"], 3), (labels, 13), (labels, 1)):
        with pytest.raises(ValueError, match="allowed") as error:
            held_out_probabilities(features, bad, groups, folds=folds)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="at least 2"):
        fit_probe(features, ["same"] * 12)


@pytest.mark.parametrize(("classes", "n"), [("ab", 6), ("abc", 4)])
def test_an_online_code_is_a_code(classes: str, n: int) -> None:
    """2^-L sums to 1 over all labellings: nothing about the labels of a block is used to send them."""
    features = np.random.default_rng(0).normal(size=(n, 3))
    groups = ["s0", "s1", "s2", "s2", "s3", "s4"][:n]
    lengths = [
        sum(online_code(features, labels, groups, classes=classes, regularization=0.1, max_steps=40).bits)
        for labels in product(classes, repeat=n)
    ]
    assert len(set(np.round(lengths, 3))) > len(classes)  # and it is not the uniform one
    assert sum(2.0**-length for length in lengths) == pytest.approx(1)


def test_constant_features_leave_the_code_of_the_answers_counts() -> None:
    labels = ["a"] * 23 + ["b"] * 11 + ["c"] * 6
    groups = [f"s{i}" for i in range(40)]
    code = online_code(np.full((40, 5), 0.1), labels, groups, fractions=(0.25, 0.5, 1), classes="abcd", seed=3)
    order = np.argsort(np.random.default_rng(3).permutation(40))  # entity names sort as s0, s1, s10, ...
    sent = [dict(zip(groups, labels, strict=True))[sorted(groups)[i]] for i in order]
    expected, past = [10 * np.log2(4)], 10
    for end in (20, 40):
        counts = Counter(sent[:past])
        expected.append(-sum(np.log2((counts[label] + 1) / (past + 4)) for label in sent[past:end]))
        past = end
    assert code.rows == (10, 10, 20)
    assert code.bits == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_constant_features_do_not_compress_even_answers(seed: int) -> None:
    code = online_code(np.ones((48, 3)), ["a", "b", "c", "d"] * 12, [f"s{i}" for i in range(48)], seed=seed)
    assert code.compression <= 1
    assert code.control_compression <= 1
    assert code.uniform_bits == 96


def test_readable_labels_compress_and_permuted_ones_do_not() -> None:
    features, labels, groups = clusters()
    code = online_code(features, labels, groups)
    assert code.compression > 2.5
    assert code.control_compression < 1.05
    assert code.selectivity == pytest.approx(code.compression - code.control_compression)
    permuted = online_code(features, shuffled_labels(labels, groups, seed=5), groups)
    assert permuted.compression < 1.05
    noisier = [online_code(features + s * np.random.default_rng(0).normal(size=features.shape), labels, groups)
               for s in (2, 6)]  # fmt: skip
    assert code.compression > noisier[0].compression > noisier[1].compression


def test_a_code_is_the_sum_of_its_blocks_each_resting_on_all_before() -> None:
    features, labels, groups = clusters(noise=4.0)
    fine = online_code(features, labels, groups, fractions=(0.1, 0.25, 0.5, 1))
    coarse = online_code(features, labels, groups, fractions=(0.25, 0.5, 1))
    assert fine.rows == (12, 18, 30, 60)
    assert coarse.rows == (30, 30, 60)
    assert fine.bits[2:] == coarse.bits[1:]
    assert fine.compression == pytest.approx(fine.uniform_bits / sum(fine.bits))


def test_an_online_code_knows_no_entity_before_it_comes() -> None:
    rng = np.random.default_rng(1)
    groups = [f"s{i // 9}" for i in range(180)]
    labels = [("x", "y")[i] for i in rng.permutation(20) % 2 for _ in range(9)]
    features = np.repeat(rng.normal(size=(20, 40)), 9, axis=0)
    assert online_code(features, labels, groups).compression < 1
    strangers = [f"s{i}" for i in range(180)]  # as if each row were somebody else: memory pays
    assert online_code(features, labels, strangers).compression > 2


def test_the_order_of_rows_and_the_names_of_answers_do_not_matter() -> None:
    features, labels, groups = clusters(n=60, noise=3.0)
    code = online_code(features, labels, groups, seed=1)
    back = online_code(features[::-1], labels[::-1], groups[::-1], seed=1)
    renamed = online_code(features, [f"{9 - int(label[1])}" for label in labels], groups, seed=1)
    assert back.bits == pytest.approx(code.bits, rel=1e-3)
    assert renamed.bits == pytest.approx(code.bits, rel=1e-3)
    assert online_code(features, labels, groups, seed=2).bits != pytest.approx(code.bits, rel=1e-3)


def test_a_code_that_cannot_be_is_one_line() -> None:
    features, labels, groups = clusters(n=12)
    for change in (
        {"labels": labels[:-1]}, {"groups": groups[:-1]}, {"classes": ["c0"]}, {"classes": ["x", "y"]},
        {"features": features[:0], "labels": [], "groups": []}, {"fractions": (0.5, 0.25, 1.0)}, {"fractions": (0.5,)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="allowed") as error:
            online_code(**{"features": features, "labels": labels, "groups": groups} | change)
        assert "\n" not in str(error.value)


def test_features_are_transformers_own_hidden_states(any_model: Model, tiny_facts: FactSet) -> None:
    facts = tiny_facts.facts[:9]
    found = residual_features(any_model, facts, "question:0", ("subject_last", "subject_mean", "last"), batch_size=4)
    for i, fact in enumerate(facts):
        ids, roles = token_roles(any_model, render(fact, "question:0"), fact.subject)
        with torch.no_grad():
            states = any_model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
        inside = [p for p, role in enumerate(roles) if role.startswith("subject")]
        for layer, hidden in enumerate(states[:-1]):  # transformers normalises the last one
            hidden = hidden[0].numpy()
            np.testing.assert_allclose(found["subject_last"][i, layer], hidden[inside[-1]], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(found["subject_mean"][i, layer], hidden[inside].mean(0), atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(found["last"][i, layer], hidden[-1], atol=1e-4, rtol=1e-4)
    assert found["last"].shape == (9, any_model.n_layers + 1, any_model.d_model)


def test_token_counts_tell_names_apart_by_their_pieces(tiny_model: Callable[..., Model], tiny_facts: FactSet) -> None:
    facts = tiny_facts.of("colour").facts[:6]
    counts = subject_token_counts(tiny_model(), facts)
    assert counts.shape[0] == 6
    assert (counts.sum(axis=1) >= 2).all()
    assert len(np.unique(counts, axis=0)) == 6
