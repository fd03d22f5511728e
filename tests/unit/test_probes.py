"""Probes: against sklearn's own pipeline, entity-disjoint, at chance on shuffled labels."""

from collections.abc import Callable

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
