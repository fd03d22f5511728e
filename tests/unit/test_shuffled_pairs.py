"""Pairs with the same answer: what they are, and that what is scored on them is nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn.activations import untouched
from mechunlearn.localize.attribution_patching import attribution_patching, first_order_scores
from mechunlearn.localize.pairs import PairBatch, build_pairs, to_batch
from mechunlearn.localize.shuffled_pairs import shuffled_pairs
from mechunlearn.models import Model, all_components


@pytest.fixture(scope="module")
def facts(tiny_facts):
    return tiny_facts.of("colour").facts


def test_donors_share_the_answer_and_the_counterfactual_is_another_candidate(tiny_model, facts) -> None:
    model = tiny_model()
    answer_of = {fact.subject: fact.target_true for fact in facts}
    pairs = build_pairs(model, facts, donors="same_answer", pairs_per_fact=2)
    assert len(pairs) == 2 * len(facts)
    others = set()
    for pair in pairs:
        fact = facts[pair.fact]
        assert pair.donor is not None
        assert pair.donor != fact.subject
        assert answer_of[pair.donor] == fact.target_true
        assert pair.answer != pair.counterfactual
        assert pair.counterfactual in pair.candidates
        others.add((pair.answer, pair.counterfactual))
    assert len(others) == 4 * 3  # every wrong candidate of every answer is drawn
    seen = {facts[p.fact].subject: (p.donor, p.counterfactual) for p in build_pairs(model, facts, donors="same_answer")}
    back = build_pairs(model, facts[::-1], donors="same_answer")
    assert seen == {facts[::-1][p.fact].subject: (p.donor, p.counterfactual) for p in back}
    assert build_pairs(model, facts, donors="same_answer", seed=1) != build_pairs(model, facts, donors="same_answer")


def test_without_candidates_the_counterfactual_is_another_answer_of_the_relation(tiny_model, facts) -> None:
    bare = [replace(fact, choices=()) for fact in facts]
    model = tiny_model()
    colours = {pair.answer for pair in build_pairs(model, bare)}
    assert {pair.counterfactual for pair in build_pairs(model, bare, donors="same_answer")} == colours


def test_a_fact_whose_answer_no_other_subject_has_is_one_line(tiny_model, facts) -> None:
    with pytest.raises(ValueError, match=r"no other subject with 'red'.*give more facts") as error:
        build_pairs(tiny_model(), [facts[0], facts[1]], donors="same_answer")
    assert "\n" not in str(error.value)


def exchanged(batch: PairBatch, model: Model) -> PairBatch:
    """The batch with the two runs' places taken, the metric the same."""
    swapped = [
        replace(p, clean=p.corrupt, corrupt=p.clean, aligned=tuple((k, c, role) for c, k, role in p.aligned))
        for p in batch.pairs
    ]
    return to_batch(model, swapped)


def test_scores_of_the_form_both_change_their_sign_when_the_runs_are_exchanged(tiny_model, facts) -> None:
    """So their expectation over pairs with the same answer is 0; one-sided forms are shifted by the curvature."""
    model = tiny_model()
    model.hf.double()
    batch, components = to_batch(model, build_pairs(model, facts, donors="same_answer")), all_components(model)
    with untouched(model):
        scores = {
            form: [first_order_scores(model, b, components, form)[0] for b in (batch, exchanged(batch, model))]
            for form in ("both", "denoise", "noise")
        }
    torch.testing.assert_close(scores["both"][0], -scores["both"][1])
    torch.testing.assert_close(scores["denoise"][0], -scores["noise"][1])
    assert not torch.allclose(scores["denoise"][0], -scores["denoise"][1], atol=1e-2)


def test_the_null_of_a_model_that_knows_is_centred_at_zero(knowing: Model, facts) -> None:
    real = attribution_patching(knowing, facts, form="both")
    null = shuffled_pairs(knowing, facts, options={"form": "both"}, draws=6)
    assert real.notes["logit_diff_clean"] > 3
    drawn = np.array(null.notes["draws"])
    assert drawn.shape == (6, len(null.components))
    np.testing.assert_allclose(drawn.mean(axis=0), null.values, atol=1e-12)
    total = null.per_fact.sum(axis=(1, 2))  # what all components together would carry, fact by fact
    assert abs(total.mean()) < 3 * total.std(ddof=1) / np.sqrt(len(total))
    assert np.abs(null.values).max() < 0.25 * real.values.max()


def test_methods_without_pairs_and_settings_of_its_own_are_refused(tiny_model, facts) -> None:
    for given, message in (
        ({"method": "all_mlps"}, "allowed: .*attribution_patching"),
        ({"options": {"donors": "other_answer"}}, "leave it out"),
        ({"options": {"form": "denoised"}}, "attribution_patching: option 'form'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            shuffled_pairs(tiny_model(), facts, **given)
        assert "\n" not in str(error.value)


def test_facts_that_share_no_answer_are_left_out_and_counted(tiny_model, facts) -> None:
    model, alone = tiny_model(), replace(facts[0], target_true="Oslo", choices=("Oslo", "red"))
    with_it = shuffled_pairs(model, [*facts[1:9], alone], draws=2)
    without = shuffled_pairs(model, facts[1:9], draws=2)
    assert (with_it.notes["n_left_out"], without.notes["n_left_out"]) == (1, 0)
    np.testing.assert_allclose(with_it.per_fact, without.per_fact, atol=1e-5)
