"""Pairs with the same answer, and answers dealt anew: what they are, and that what is scored on them is nothing."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn.activations import untouched
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.attribution_patching import attribution_patching, first_order_scores
from mechunlearn.localize.pairs import PairBatch, build_pairs, to_batch
from mechunlearn.localize.shuffled_pairs import dealt_answers, shuffled_pairs
from mechunlearn.models import Model, all_components

CONTROLS = ("all_mlps", "nonlocalized", "random_components", "random_mlps", "shuffled_pairs")
FAST = {
    "fact_lookup_probe": {"folds": 2, "draws": 1}, "fact_lookup_paths": {"fdr": 1.0}, "learned_mask": {"steps": 5},
}  # fmt: skip


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


# --- every score ---


@pytest.mark.parametrize("name", [name for name in LOCALIZERS.names() if name not in CONTROLS])
def test_every_localizer_has_a_null(name, tiny_model, facts, tiny_facts) -> None:
    model, method = tiny_model(), LOCALIZERS.get(name)
    data = {"retain": tiny_facts.of("city").facts[:8], "twin": tiny_model(seed=1)}
    null = shuffled_pairs(model, facts, method=name, options=FAST.get(name), draws=2, **data)
    assert null.notes["null"] == ("pairs" if "donors" in method.options.model_fields else "answers")
    assert null.notes["n_left_out"] == 0
    assert null.per_fact.shape[0] == len(facts)
    assert np.isfinite(null.values).all()
    own = method.function(model, facts, **method.validate(FAST.get(name, {})), **method.wanted(**data))
    assert (own.components, own.roles) == (null.components, null.roles)
    assert not np.array_equal(own.per_fact, null.per_fact)


def test_facts_to_retain_and_a_twin_are_handed_on(tiny_model, facts, tiny_facts) -> None:
    model, cities = tiny_model(), tiny_facts.of("city").facts
    given, other = (shuffled_pairs(model, facts, method="retain_contrast", draws=1, retain=r) for r in (None, cities))
    assert not np.allclose(given.values, other.values)
    found = shuffled_pairs(model, facts, method="fact_lookup_probe", options={"folds": 2}, draws=1, twin=model)
    assert found.notes["first_draw"]["twin"] == model.name


def test_dealt_answers_are_those_of_the_relation_and_nobodys_own(tiny_facts) -> None:
    facts = tiny_facts.facts[:60]
    seen = set()
    for seed in range(20):
        dealt = dealt_answers(facts, seed)
        assert {fact.key: other for fact, other in zip(facts, dealt, strict=True)} == {
            fact.key: other for fact, other in zip(facts[::-1], dealt_answers(facts[::-1], seed), strict=True)
        }
        for relation in ("colour", "city"):
            before, after = ([f.target_true for f in some if f.relation == relation] for some in (facts, dealt))
            assert Counter(before) == Counter(after)
        assert not any(a.target_true == b.target_true for a, b in zip(facts, dealt, strict=True))
        assert [replace(b, target_true=a.target_true) for a, b in zip(facts, dealt, strict=True)] == list(facts)
        seen.add(dealt[0].target_true)
    assert seen == set(facts[0].choices) - {facts[0].target_true}


def test_no_fact_is_dealt_an_answer_beside_its_choices_or_one_that_its_subject_has(facts) -> None:
    red, blue = (next(f for f in facts if f.target_true == colour) for colour in ("red", "blue"))
    choosy = replace(red, subject="Ada", choices=("red", "amber"))
    both = [replace(red, subject="Bo"), replace(blue, subject="Bo")]
    edited = replace(blue, subject="Cy", target_new="amber")
    for seed in range(10):
        *_, first, second, third, fourth = dealt_answers([*facts, choosy, *both, edited], seed)
        assert first.target_true == "amber"
        assert {second.target_true, third.target_true} <= {"green", "amber"}
        assert fourth.target_new == (None if fourth.target_true == "amber" else "amber")


def test_facts_that_cannot_be_dealt_another_answer_are_left_out_and_counted(tiny_model, facts) -> None:
    model = tiny_model()
    reds = [fact for fact in facts if fact.target_true == "red"][:5]
    blues = [fact for fact in facts if fact.target_true == "blue"][:2]
    alone = replace(facts[0], target_true="Oslo", choices=("Oslo", "red"), relation="city")
    found = shuffled_pairs(model, [*reds, *blues, alone], method="gradient_norm", draws=2)
    assert (found.notes["n_left_out"], found.n_facts) == (4, 4)
    with pytest.raises(ValueError, match="no two of them of one relation whose answers could be exchanged") as error:
        shuffled_pairs(model, reds, method="gradient_norm")
    assert "\n" not in str(error.value)


def test_a_form_of_patching_without_donors_has_a_null_of_dealt_answers(tiny_model, facts) -> None:
    model, zero = tiny_model(), {"method": "activation_patching", "options": {"form": "zero"}, "draws": 1}
    with pytest.raises(ValueError, match="option 'donors'"):
        shuffled_pairs(model, facts, **zero)
    assert shuffled_pairs(model, facts, null="answers", **zero).notes["null"] == "answers"


def test_controls_and_settings_of_its_own_are_refused(tiny_model, facts) -> None:
    for given, message in (
        *(({"method": name}, "allowed: .*attribution_patching") for name in CONTROLS),
        ({"method": "fisher", "null": "pairs"}, "allowed: activation_patching, atp_star"),
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
