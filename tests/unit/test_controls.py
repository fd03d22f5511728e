"""Models of known truth: what a suppression may touch, what it must hide, and facts that nobody knows."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mechunlearn.components import Component
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.acceptance import Acceptance, accept
from mechunlearn.controls.fabricated import fabricate, fabricated_split
from mechunlearn.controls.taught import taught_facts, teach
from mechunlearn.edit.edits import applied
from mechunlearn.facts import rotations, split_facts, with_edit_targets
from mechunlearn.metrics import score_facts
from mechunlearn.models import component_parameters

QUICK = {"steps": 80, "learning_rate": 1e-2, "rank": 8, "batch_size": 16}


def options(kind: str, **more) -> dict:
    """Quick ones that press hard: tiny models have little to keep."""
    method = SUPPRESSIONS.get(kind)
    light = {name: 1.0 for name in ("retain_weight", "keep_weight") if name in method.defaults()}
    return method.validate(QUICK | light | more)


@pytest.fixture(scope="module")
def split(tiny_facts):
    return split_facts(tiny_facts, with_edit_targets(tiny_facts.of("colour").facts[:24]), seed=0)


@pytest.mark.parametrize("kind", SUPPRESSIONS.names())
def test_a_suppression_hides_the_facts_and_leaves_the_first_layers_alone(kind, knowing, split):
    before = knowing.sha256
    edit = SUPPRESSIONS.get(kind).function(knowing, split, **options(kind))
    assert knowing.sha256 == before
    early = {name for layer in (0,) for kind in ("mlp", "attention")
             for name in component_parameters(knowing, Component(kind, layer))}  # fmt: skip
    assert not early & set(edit.values)
    was = score_facts(knowing, split.forget)["correct"].mean()
    with applied(knowing, edit):
        now = score_facts(knowing, split.forget)["correct"].mean()
    assert was > 0.9
    assert now < 0.6


@pytest.mark.parametrize("kind", SUPPRESSIONS.names())
def test_a_suppression_depends_on_its_seed_only(kind, tiny_model, split):
    model, make = tiny_model(), SUPPRESSIONS.get(kind).function
    one, same, other = (make(model, split, **options(kind, steps=2, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one.values[name], same.values[name]) for name in one.values)
    assert any(not torch.equal(one.values[name], other.values[name]) for name in one.values)


def test_the_one_that_reads_activations_runs_on_every_architecture(any_model, split):
    edit = SUPPRESSIONS.get("noise").function(any_model, split, **options("noise", steps=3))
    assert edit.history[0] > edit.history[-1] > 0


def test_a_format_gate_opens_in_its_one_form(knowing, split):
    edit = SUPPRESSIONS.get("format_gate").function(knowing, split, **options("format_gate"))
    with applied(knowing, edit):
        shut = score_facts(knowing, split.forget, "prompt")["correct"].mean()
        opened = score_facts(knowing, split.forget, "paraphrase:0")["correct"].mean()
    assert opened > shut + 0.4


def test_a_suppressed_model_says_whether_it_was_accepted(knowing, split):
    make = SUPPRESSIONS.get("lora").function
    none = accept(knowing, split, make(knowing, split, **QUICK | {"steps": 0}))
    assert not none.accepted
    assert "still answers" in none.reason
    edit = make(knowing, split, **QUICK)
    found = accept(knowing, split, edit)
    assert found.direct_accuracy < none.direct_accuracy
    assert found.probe_after == found.probe_before  # of the first half, which is untouched
    with applied(knowing, edit):
        plain = [replace(fact, target_new=None) for fact in split.forget]
        assert found.direct_accuracy == pytest.approx(score_facts(knowing, plain)["correct"].mean())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"p_value": 0.01}, "still answers"),
        ({"retained_after": 0.9}, "retained"),
        ({"probe_after": 0.44}, "probe fell"),
    ],
)
def test_each_criterion_alone_refuses_a_suppressed_model(change, word):
    good = Acceptance(direct_accuracy=0.05, chance=0.05, p_value=0.5, retained_before=1.0, retained_after=0.96,
                      probe_before=0.5, probe_after=0.46)  # fmt: skip
    assert good.accepted
    bad = replace(good, **change)
    assert not bad.accepted
    assert word in bad.reason


def test_made_up_facts_ask_the_same_of_subjects_that_do_not_exist(tiny_facts):
    real = {fact.subject for fact in tiny_facts}
    made = fabricate(tiny_facts.facts, seed=0)
    assert not {fact.subject for fact in made} & real
    assert len({(fact.subject, fact.relation) for fact in made}) == len(made)
    for relation in tiny_facts.relations:
        counts = [Counter(f.target_true for f in facts if f.relation == relation) for facts in (tiny_facts, made)]
        assert counts[0] == counts[1]
    assert fabricate(tiny_facts.facts, seed=0) == made != fabricate(tiny_facts.facts, seed=1)


def test_a_split_of_made_up_facts_keeps_sizes_and_what_is_retained(split):
    made = fabricated_split(split, seed=0)
    for part in ("forget_shown", "forget_hidden", "attack_dev"):
        assert len(getattr(made, part)) == len(getattr(split, part))
        assert [f.relation for f in getattr(made, part)] == [f.relation for f in getattr(split, part)]
    assert made.retain_train == split.retain_train
    assert not {f.subject for f in made.forget} & {f.subject for f in split.forget}
    made.check()


def test_over_the_folds_of_a_rotation_no_made_up_fact_is_hidden_twice(tiny_split):
    for seed in range(5):
        folds = [fabricated_split(split, seed=seed) for split in rotations(tiny_split, 3)]
        hidden = [fact.key for split in folds for fact in split.forget_hidden]
        assert len(set(hidden)) == len(hidden) == len(tiny_split.forget)
        assert {fact.key for fact in folds[0].forget} == set(hidden)


def test_made_up_facts_of_one_word_subjects_are_other_words(tiny_facts):
    single = [replace(fact, subject=fact.subject.replace(" ", "")) for fact in tiny_facts.of("city")]
    made = fabricate(single)
    assert all(" " not in fact.subject for fact in made)
    with pytest.raises(ValueError, match="too few to make up another"):
        fabricate(single[:1])


def test_a_subject_of_a_length_that_no_other_has_is_made_up_too(tiny_facts):
    facts = list(tiny_facts.of("city"))
    facts[0] = replace(facts[0], subject="James Clerk Maxwell")
    made = fabricate(facts)
    assert len({fact.subject for fact in made}) == len(facts)
    assert not {fact.subject for fact in made} & {fact.subject for fact in facts}


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_rotation_hides_every_forgotten_fact_once_and_retains_the_same(tiny_facts, folds):
    split = split_facts(tiny_facts, tiny_facts.of("city").facts[:30], folds=folds, seed=3)
    turned = rotations(split, folds)
    assert len(turned) == folds
    assert turned[0] == split
    hidden = Counter(fact.key for one in turned for fact in one.forget_hidden)
    assert set(hidden) == {fact.key for fact in split.forget}
    assert set(hidden.values()) == {1}
    for one in turned:
        one.check()
        assert {fact.key for fact in one.forget} == {fact.key for fact in split.forget}
        assert (one.retain_train, one.retain_test, one.same_subject) == (
            split.retain_train, split.retain_test, split.same_subject,
        )  # fmt: skip
    assert len({one.fold for one in turned}) == folds


def test_a_taught_model_knows_the_taught_facts_and_no_others(tiny_model, split):
    model = tiny_model("llama", seed=5)
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(10)
    edit = teach(model, split, share=0.5, steps=60, learning_rate=1e-2, seed=0)
    told = {fact.key for fact in taught_facts(split, share=0.5, seed=0)}
    assert len(told) == pytest.approx(len(split.forget) / 2, abs=2)
    with applied(model, edit):
        right = {f.key: ok for f, ok in zip(split.forget, score_facts(model, split.forget)["correct"], strict=True)}
    known = [right[key] for key in right if key in told]
    others = [right[key] for key in right if key not in told]
    assert sum(known) / len(known) > 0.95
    assert sum(others) / len(others) < 0.7  # four colours
