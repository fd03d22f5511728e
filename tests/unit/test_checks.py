"""What is noted beside a localization."""

import numpy as np
import pytest

from mechunlearn import localize
from mechunlearn.components import Component, ComponentScores
from mechunlearn.localize.checks import describe_checks, with_agreement, with_stability


@pytest.fixture
def facts(tiny_facts):
    return tiny_facts.of("colour").facts[:8]


@pytest.mark.parametrize("form", ["denoise", "noise", "both"])
def test_a_first_order_score_is_compared_with_patching_of_the_same_pairs(form, knowing, facts):
    options = {"form": form, "pairs_per_fact": 2, "seed": 3}
    scores = localize.attribution_patching(knowing, facts, **options)
    found = with_agreement(knowing, facts, scores, localize.attribution_patching, options)
    exact = [
        localize.activation_patching(knowing, facts, form=one, roles=("all",), pairs_per_fact=2, seed=3).values
        for one in (("denoise", "noise") if form == "both" else (form,))
    ]
    expected = np.corrcoef(scores.values, np.mean(exact, axis=0))[0, 1]
    assert found.notes["agreement"]["pearson"] == pytest.approx(expected)
    assert found.notes["agreement"]["n_facts"] == 8
    assert (found.per_fact == scores.per_fact).all()
    assert f"Pearson {expected:.2f}" in describe_checks(found)[0]


def test_of_many_facts_some_are_compared_on_both_sides(knowing, facts):
    scores = localize.attribution_patching(knowing, facts)
    found = with_agreement(knowing, facts, scores, localize.attribution_patching, {}, max_facts=5)
    assert found.notes["agreement"]["n_facts"] == 5


def test_neurons_are_compared_as_their_mlps_and_other_methods_with_nothing(knowing, facts):
    neurons = localize.attribution_patching(knowing, facts, kinds=("neuron",))
    mlps = localize.attribution_patching(knowing, facts, kinds=("mlp",))
    options = {"kinds": ("neuron",)}
    found = with_agreement(knowing, facts, neurons, localize.attribution_patching, options).notes["agreement"]
    expected = with_agreement(knowing, facts, mlps, localize.attribution_patching, {"kinds": ("mlp",)})
    assert found == pytest.approx(expected.notes["agreement"])
    norms = localize.gradient_norm(knowing, facts)
    assert with_agreement(knowing, facts, norms, localize.gradient_norm, {}) is norms


def test_sizes_are_compared_with_sizes(knowing, facts):
    scores = localize.atp_star(knowing, facts)
    exact = localize.activation_patching(knowing, facts, roles=("all",))
    found = with_agreement(knowing, facts, scores, localize.atp_star, {}).notes["agreement"]
    expected = np.corrcoef(scores.values, np.abs(exact.per_fact).sum(axis=2).mean(axis=0))[0, 1]
    assert found["pearson"] == pytest.approx(expected)


def test_a_ranking_that_every_fact_shares_is_stable_and_is_saved_whatever_it_holds(knowing, facts, tmp_path):
    same = np.array([3.0, 2.0, 1.0])[None, :, None] * np.arange(1, 9)[:, None, None]
    components = tuple(Component("mlp", i) for i in range(3))
    shared = {"method": "m", "metric": "logit_diff", "sign": "+", "components": components, "roles": ("all",)}
    scores = ComponentScores(**shared, per_fact=same)
    found = with_stability(knowing, facts, scores, lambda *_: scores, {}, forms=2)
    assert found.notes["stability"]["subjects"] == pytest.approx(1)
    assert found.notes["stability"]["forms"] == pytest.approx(1)
    flat = ComponentScores(**shared, per_fact=np.ones_like(same))
    nothing = with_stability(knowing, facts, flat, lambda *_: flat, {}, forms=2)
    nothing.save(tmp_path / "scores.safetensors")
    assert "undefined" in describe_checks(ComponentScores.load(tmp_path / "scores.safetensors"))[0]
    one = ComponentScores(**shared, per_fact=np.tile(same[:1], (8, 1, 1)))  # says nothing of other facts
    assert with_stability(knowing, facts, one, lambda *_: one, {}, forms=1).notes["stability"]["subjects"] is None
    assert "undefined" in one._repr_html_()
    assert "1.00 (5% quantile 1.00)" in scores._repr_html_()
    assert with_stability(knowing, facts[:3], scores, lambda *_: scores, {}, forms=1) is scores  # not a row a fact
