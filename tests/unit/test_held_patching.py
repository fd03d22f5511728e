"""Patching with other sublayers held: equal to plain patching where nothing is held, to a formula where all is."""

import numpy as np
import pytest
import torch

from mechunlearn.activations import exact, hooked, last_logits
from mechunlearn.components import ROLES, Component
from mechunlearn.localize.held_patching import held_patching
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.localize.retain_contrast import retain_contrast
from mechunlearn.models import final_norm, unembedding

LAST = ROLES.index("last")


@pytest.fixture
def facts(tiny_split):
    return tiny_split.forget[:4]


def batch_of(model, facts):
    return to_batch(model, sorted(build_pairs(model, facts), key=lambda pair: pair.fact))


@torch.no_grad()
def test_with_nothing_held_it_is_plain_patching(any_model, facts):
    scores = held_patching(any_model, facts, held=())
    batch = batch_of(any_model, facts)
    for kind in ("mlp", "attention"):
        for layer in range(any_model.n_layers):
            with hooked(any_model, record=[(kind, layer)]) as seen:
                last_logits(any_model, batch.corrupt)
            donor = seen[kind, layer]
            clean = batch.logit_diff(last_logits(any_model, batch.clean))
            for role in ("subject_last", "last"):
                put = {(kind, layer): lambda value, donor=donor, role=role: batch.put(value, donor, (role,))}
                with hooked(any_model, change=put):
                    drop = clean - batch.logit_diff(last_logits(any_model, batch.clean))
                found = scores.per_fact[:, scores.components.index(Component(kind, layer)), ROLES.index(role)]
                np.testing.assert_allclose(found, drop.numpy(), atol=1e-5)
    assert np.abs(scores.per_fact[:, :, [ROLES.index("subject_last"), LAST]]).max(axis=(0, 1)).min() > 1e-3


@torch.no_grad()
def test_with_all_held_it_is_the_write_at_the_last_token_through_norm_and_unembedding(any_model, facts):
    """Closed form: the stream after the last block, with the difference of the two writes added."""
    scores = held_patching(any_model, facts, held=("mlp", "attention"))
    batch = batch_of(any_model, facts)
    rows = torch.arange(len(facts))
    last = any_model.n_layers - 1
    places = [(kind, layer) for kind in ("mlp", "attention") for layer in range(any_model.n_layers)]
    with hooked(any_model, record=[*places, ("block", last)]) as own:
        clean = last_logits(any_model, batch.clean)
    with hooked(any_model, record=places) as donor:
        last_logits(any_model, batch.corrupt)
    stream = own["block", last][rows, batch.clean.last]
    cap = getattr(any_model.hf.config, "final_logit_softcapping", None)  # Gemma 2
    for number, component in enumerate(scores.components):
        place = (component.kind, component.layer)
        change = donor[place][rows, batch.corrupt.last] - own[place][rows, batch.clean.last]
        logits = exact(unembedding(any_model)(final_norm(any_model)(stream + change)))
        logits = cap * torch.tanh(logits / cap) if cap else logits
        expected = batch.logit_diff(clean) - batch.logit_diff(logits)
        np.testing.assert_allclose(scores.per_fact[:, number, LAST], expected.numpy(), atol=2e-5)
    assert np.abs(np.delete(scores.per_fact, LAST, axis=2)).max() < 1e-5  # no other token reaches the answer


def test_the_last_layers_mlp_has_nothing_after_it_to_hold(tiny_model, facts):
    model = tiny_model()
    last = Component("mlp", model.n_layers - 1)
    one, other = (held_patching(model, facts, held=held, kinds=("mlp",)) for held in ((), ("mlp",)))
    at = one.components.index(last)
    np.testing.assert_allclose(one.per_fact[:, at], other.per_fact[:, at], atol=1e-6)
    assert np.abs(one.per_fact[:, 0] - other.per_fact[:, 0]).max() > 1e-3


def test_more_pairs_are_averaged_and_no_kinds_is_an_error(tiny_model, facts):
    model = tiny_model()
    scores = held_patching(model, facts, pairs_per_fact=2, batch_size=3)
    assert scores.notes["n_pairs"] == 2 * len(facts)
    whole = held_patching(model, facts, pairs_per_fact=2, batch_size=64)
    np.testing.assert_allclose(scores.per_fact, whole.per_fact, atol=1e-5)
    with pytest.raises(ValueError, match="'kinds'"):
        held_patching(model, facts, kinds=())


def test_the_contrast_of_a_set_with_itself_is_zero_and_without_retained_facts_shares(tiny_model, tiny_split):
    model, facts = tiny_model(), tiny_split.forget[:6]
    same = retain_contrast(model, facts, retain=facts)
    np.testing.assert_allclose(same.by_role, 0, atol=1e-12)
    alone = retain_contrast(model, facts)
    assert np.abs(alone.values).sum() == pytest.approx(1)
    plain = held_patching(model, facts, held=())
    np.testing.assert_allclose(alone.values, plain.values / np.abs(plain.values).sum(), atol=1e-6)
    assert alone.notes["n_retain"] == 0
    assert "nothing is subtracted" in alone.sign
    assert "less the retained facts' share" in same.sign


def test_the_contrast_is_the_difference_of_two_profiles(tiny_model, tiny_split):
    model = tiny_model()
    new, old = tiny_split.forget[:5], tiny_split.retain_train[:7]
    both = retain_contrast(model, new, retain=old, held=("mlp",))
    one, other = (retain_contrast(model, facts, held=("mlp",)).values for facts in (new, old))
    np.testing.assert_allclose(both.values, one - other, atol=1e-9)
    assert np.abs(both.values).max() > 1e-3


def test_the_contrast_refuses_runs_that_do_not_differ(tiny_model, tiny_split):
    model = tiny_model()
    with torch.no_grad():
        unembedding(model).weight.zero_()
    with pytest.raises(ValueError, match="no effect"):
        retain_contrast(model, tiny_split.forget[:3])
