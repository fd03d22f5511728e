"""Circuits: what is left when all else is the donor's, and whether rankings are stable."""

from dataclasses import replace

import numpy as np
import pytest

from mechunlearn import localize
from mechunlearn.components import Component, ComponentScores
from mechunlearn.localize.faithfulness import FaithfulnessCurve, circuit_metrics, faithfulness, minimality
from mechunlearn.localize.stability import stability
from mechunlearn.models import all_components

SHARES = (0.25, 0.5, 0.75, 1.0)


def scored(model, facts, values=None):
    components = all_components(model)
    values = np.arange(len(components), 0, -1.0) if values is None else values
    per_fact = np.broadcast_to(values[None, :, None], (len(facts), len(components), 1))
    return ComponentScores(method="x", metric="m", sign="s", components=components, roles=("all",), per_fact=per_fact)


def curve(f, sizes):
    return FaithfulnessCurve(method="x", sizes=sizes, n_components=tuple(range(len(sizes))), f=np.array(f),
                             completeness=np.zeros(len(sizes)))  # fmt: skip


def test_areas_are_the_benchmarks_on_a_worked_example():
    """MIB's evaluation: trapezoids over linear k of f, and of |1 - f|; here by hand."""
    example = curve([0.0, 0.4, 1.2, 1.0], (0.1, 0.2, 0.5, 1.0))
    cpr = 0.1 * (0.0 + 0.4) / 2 + 0.3 * (0.4 + 1.2) / 2 + 0.5 * (1.2 + 1.0) / 2
    cmd = 0.1 * (1.0 + 0.6) / 2 + 0.3 * (0.6 + 0.2) / 2 + 0.5 * (0.2 + 0.0) / 2
    assert example.cpr == pytest.approx(cpr)
    assert example.cmd == pytest.approx(cmd)
    assert curve([0.3] * 4, (0.1, 0.2, 0.5, 1.0)).cpr_log == pytest.approx(0.3)


@pytest.mark.parametrize("kinds", [("mlp", "attention"), ("mlp", "head"), ("neuron", "head")])
def test_the_whole_is_faithful_and_nothing_is_the_corrupt_run_but_for_embeddings(any_model, tiny_facts, kinds):
    everything = all_components(any_model, kinds)
    same = [f for f in tiny_facts.facts if f.relation == "colour"][:6]
    clean, corrupt, (whole, none) = circuit_metrics(any_model, same, [everything, ()], everything)
    assert whole == pytest.approx(clean, abs=1e-5)
    assert none != pytest.approx(whole, abs=1e-4)
    assert np.isfinite([corrupt, none]).all()


def test_heads_left_out_one_by_one_are_the_sublayer_left_out(any_model, tiny_facts):
    if any_model.architecture.attention_write != any_model.architecture.attention:
        pytest.skip("a norm stands between the heads and the stream")
    facts = tiny_facts.facts[:6]
    sublayers, parts = all_components(any_model), all_components(any_model, ("mlp", "head"))
    *_, (a,) = circuit_metrics(any_model, facts, [[c for c in sublayers if str(c) != "a1"]], sublayers)
    *_, (b,) = circuit_metrics(any_model, facts, [[c for c in parts if not str(c).startswith("a1.")]], parts)
    assert a == pytest.approx(b, abs=1e-4)


def test_the_curve_ends_at_one_and_its_complement_starts_there(knowing, tiny_facts):
    facts = tiny_facts.facts[:12]
    found = faithfulness(knowing, facts, scored(knowing, facts), sizes=(0.01, *SHARES))
    assert found.n_components == (0, 1, 3, 4, 6)
    assert found.f[0] == 0
    assert found.f[-1] == pytest.approx(1, abs=1e-4)
    assert found.completeness[0] == pytest.approx(1, abs=1e-4)
    assert found.completeness[-1] == 0


def test_a_better_ranking_has_a_larger_area(knowing, tiny_facts):
    facts = tiny_facts.facts[:24]
    scores = localize.resample_ablation(knowing, facts)
    upside_down = replace(scores, per_fact=-scores.per_fact)
    sizes = tuple(i / 3 for i in (1, 2, 3))
    assert (
        faithfulness(knowing, facts, scores, sizes=sizes).cpr
        > faithfulness(knowing, facts, upside_down, sizes=sizes).cpr
    )


def test_a_member_that_does_nothing_is_not_needed(knowing, tiny_facts):
    facts = tiny_facts.facts[:12]
    everything = all_components(knowing)
    needed = minimality(knowing, facts, everything, everything)
    assert max(needed.values()) > 0.2
    with pytest.raises(ValueError, match="not among"):
        minimality(knowing, facts, everything, everything[:2])


def test_a_head_beside_its_sublayer_is_refused(tiny_model, tiny_facts):
    model = tiny_model()
    scores = localize.attribution_patching(model, tiny_facts.facts[:2], kinds=("attention", "head"))
    with pytest.raises(ValueError, match=r"a0\.h0 beside a0"):
        faithfulness(model, tiny_facts.facts[:2], scores)
    with pytest.raises(ValueError, match="rising shares"):
        faithfulness(model, tiny_facts.facts[:2], scored(model, tiny_facts.facts[:2]), sizes=(0.5, 0.2))


# --- reductions and stability ---


def test_reductions_rank_as_they_say():
    per_fact = np.array([[[1.0], [5.0], [-2.0]], [[1.0], [-5.0], [-2.0]]])
    scores = ComponentScores(method="x", metric="m", sign="s", components=tuple(Component("mlp", i) for i in range(3)),
                             roles=("all",), per_fact=per_fact)  # fmt: skip
    assert [str(c) for c in scores.ranking()] == ["m0", "m1", "m2"]
    assert [str(c) for c in scores.ranking("mean_of_abs")] == ["m1", "m2", "m0"]
    assert [str(c) for c in scores.ranking("abs_of_mean")] == ["m2", "m0", "m1"]
    with pytest.raises(ValueError, match="mean_of_abs"):
        scores.reduced("median")  # type: ignore[arg-type]


def test_scores_alike_for_every_subject_are_stable_and_noise_is_not(tiny_model, tiny_facts):
    model, facts = tiny_model(), tiny_facts.facts[:40]
    alike = scored(model, facts)
    noise = replace(alike, per_fact=np.random.default_rng(0).normal(size=alike.per_fact.shape))
    sized = replace(alike, per_fact=alike.per_fact * np.arange(1, 41)[:, None, None])
    assert stability(facts, sized).subjects == pytest.approx(1)
    assert np.isnan(stability(facts, alike).subjects)  # one row for all says nothing of other subjects
    found = stability(facts, noise)
    assert found.subjects_lower < found.subjects < 0.95
    assert found.n_subjects == 20
    assert np.isnan(found.forms)
    with pytest.raises(ValueError, match="allowed: the 40"):
        stability(facts[:3], noise)


def test_forms_are_compared_by_scoring_again(tiny_model, tiny_facts):
    facts = tiny_facts.facts[:8]
    asked = []

    def by_prompt(model, facts):
        asked.append(facts[0].prompt)
        order = 1 if len(asked) == 1 else -1
        return scored(model, facts, np.arange(6.0) * order)

    model = tiny_model()
    scores = by_prompt(model, facts)
    found = stability(facts, scores, by_prompt, model=model)
    assert asked[1] == facts[0].paraphrases[0]
    assert found.n_forms == 2
    assert found.forms == pytest.approx(-1)
