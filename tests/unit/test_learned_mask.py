"""Hard-concrete gates: both ends are the two runs, the distribution is the paper's, training opens what is needed."""

import numpy as np
import pytest
import torch

from mechunlearn.activations import by_place, last_logits, untouched
from mechunlearn.localize.gates import gated_logits, hard_concrete, probability_open
from mechunlearn.localize.learned_mask import learned_mask
from mechunlearn.localize.pairs import build_pairs, record_donor, to_batch
from mechunlearn.models import Model, all_components, mlp_neurons


@pytest.fixture(scope="module")
def facts(tiny_facts):
    return tiny_facts.of("colour").facts[:16]


@pytest.mark.parametrize("kinds", [("mlp", "attention"), ("neuron", "head")], ids="-".join)
def test_open_gates_give_the_facts_run_and_closed_ones_the_donors(any_model: Model, facts, kinds) -> None:
    pairs = [pair for pair in build_pairs(any_model, facts) if len(pair.clean) == len(pair.corrupt)]
    batch, components = to_batch(any_model, pairs), all_components(any_model, kinds)
    places = by_place(components)
    with untouched(any_model), torch.no_grad():
        donors = record_donor(any_model, batch, list(places))
        clean, corrupt = last_logits(any_model, batch.clean), last_logits(any_model, batch.corrupt)
        for n_roles in (1, 5):
            gate = torch.ones(len(pairs), len(components), n_roles)
            torch.testing.assert_close(gated_logits(any_model, batch, donors, gate, places), clean)
            torch.testing.assert_close(gated_logits(any_model, batch, donors, 0 * gate, places), corrupt)
            half = gated_logits(any_model, batch, donors, gate / 2, places)
    assert not torch.allclose(clean, corrupt, atol=1e-3)
    assert not torch.allclose(half, clean, atol=1e-3)
    assert not torch.allclose(half, corrupt, atol=1e-3)


def test_a_gate_of_a_role_acts_on_tokens_of_that_role_alone(tiny_model, facts) -> None:
    model = tiny_model()
    batch, components = to_batch(model, build_pairs(model, facts)), all_components(model)
    places = by_place(components)
    with untouched(model), torch.no_grad():
        donors = record_donor(model, batch, list(places))
        gates = torch.ones(len(batch.pairs), len(components), 5)
        gates[:, :, 4] = 0  # the last token, and prompts of one template share it: only what it gathered differs
        last = gated_logits(model, batch, donors, gates, places)
        torch.testing.assert_close(last, last_logits(model, batch.corrupt))


def test_gates_are_hard_concrete() -> None:
    generator = torch.Generator().manual_seed(0)
    for logit in (-2.0, 0.3, 2.0):
        drawn = hard_concrete(torch.tensor(logit), torch.rand(200_000, generator=generator))
        assert (drawn > 0).float().mean().item() == pytest.approx(
            probability_open(torch.tensor(logit)).item(), abs=5e-3
        )
        assert 0 < (drawn == 0).sum() < len(drawn)
        assert 0 < (drawn == 1).sum() < len(drawn)
    assert probability_open(torch.tensor(0.0)).item() == pytest.approx(1 / (1 + (0.1 / 1.1) ** (2 / 3)))


def test_what_writes_nothing_is_closed_and_without_a_price_nothing_moves_it(tiny_model, facts) -> None:
    model = tiny_model()
    with torch.no_grad():
        mlp_neurons(model, 1).weight.zero_()  # type: ignore[union-attr]
    silent = all_components(model).index(next(c for c in all_components(model) if str(c) == "m1"))
    priced = learned_mask(model, facts, steps=60, sparsity=1.0)
    free = learned_mask(model, facts, steps=10, sparsity=0.0)
    assert priced.values[silent] < 0.2
    assert free.values[silent] == pytest.approx(0.857, abs=1e-3)  # E[z] of the start


def test_training_keeps_the_answer_with_fewer_components(knowing: Model, facts) -> None:
    scores = learned_mask(knowing, facts, steps=80, sparsity=2.0)
    assert scores.notes["loss_last"] < scores.notes["loss_first"] - 0.3
    assert scores.notes["logit_diff_kept"] > 0 > scores.notes["logit_diff_closed"]
    assert 0 < (scores.values > 0.5).sum() < len(scores.values)
    assert np.ptp(scores.per_fact, axis=0).max() == 0  # shared gates


def test_gates_of_one_fact_do_not_depend_on_the_others(tiny_model, facts) -> None:
    model = tiny_model()
    scores = learned_mask(model, facts, gates="per_fact", by_role=True, steps=4)
    again = learned_mask(model, facts[::-1], gates="per_fact", by_role=True, steps=4)
    assert scores.roles == ("subject_first", "subject_middle", "subject_last", "between", "last")
    np.testing.assert_allclose(scores.per_fact, again.per_fact[::-1], atol=1e-6)
    assert np.ptp(scores.per_fact, axis=0).max() > 0
    np.testing.assert_array_equal(
        learned_mask(model, facts, steps=4).per_fact, learned_mask(model, facts, steps=4).per_fact
    )
    assert np.ptp(learned_mask(model, facts, steps=4, seed=1).values - learned_mask(model, facts, steps=4).values) > 0
