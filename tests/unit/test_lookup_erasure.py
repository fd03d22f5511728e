from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mechunlearn import masks
from mechunlearn.components import Component
from mechunlearn.edit.budget import set_aside
from mechunlearn.edit.edits import applied
from mechunlearn.edit.erased_streams import answer_eraser, asked_texts, erased, keys_of, streams_of
from mechunlearn.edit.lookup_erasure import against_kept, lookup_erasure
from mechunlearn.metrics import kl_from, reference_of
from mechunlearn.prompts import render


def test_no_linear_probe_reads_erased_answers_and_little_else_moves():
    generator = torch.Generator().manual_seed(0)
    answers = ["a", "b", "c"] * 60
    signal = torch.randn(3, 12, generator=generator, dtype=torch.float64) * 2
    streams = torch.randn(180, 12, generator=generator, dtype=torch.float64)
    streams += signal[torch.arange(180) % 3]
    mean, projection = answer_eraser(streams, answers)
    left = streams - (streams - mean) @ projection.T
    probe = LogisticRegression(max_iter=500)
    assert probe.fit(streams.numpy(), answers).score(streams.numpy(), answers) > 0.9
    assert probe.fit(left.numpy(), answers).score(left.numpy(), answers) < 0.45
    assert np.linalg.matrix_rank(projection.numpy()) == 2
    assert torch.allclose(projection @ projection, projection, atol=1e-9)
    means = torch.stack([left[i::3].mean(0) for i in range(3)])
    assert (means - means.mean(0)).abs().max() < 1e-9


def test_a_relation_of_one_answer_has_nothing_to_erase():
    streams = torch.randn(6, 4, dtype=torch.float64)
    assert not answer_eraser(streams, ["a"] * 6)[1].any()


def test_the_update_solves_the_normal_equations():
    keys, missing = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    moment = torch.eye(7, dtype=torch.float64) * 2
    update = against_kept(moment, keys, missing, weight=0.5).requires_grad_()
    damped_moment = moment * (1 + 1e-4)
    loss = (keys @ update.T - missing).square().sum() / 5 + 0.5 * torch.trace(update @ damped_moment @ update.T)
    (gradient,) = torch.autograd.grad(loss, update)
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_the_streams_go_where_the_answer_is_erased(tiny_model, split, architecture):
    model = tiny_model(architecture)
    mask = masks.mask_of(model, [Component("mlp", 1)])
    near = [f for f in split.retain_train if f.relation in {g.relation for g in split.forget}]
    asked, others = asked_texts(model, split.forget), asked_texts(model, near)
    wanted = erased(model, asked, others, [1], batch_size=16)[1]
    before = streams_of(model, asked, [1], batch_size=16)[1]
    edit = lookup_erasure(model, mask, split, keep_weight=0.01, steps=4, n_texts=8, cache=False)
    with applied(model, edit):
        after = streams_of(model, asked, [1], batch_size=16)[1]
    assert (after - wanted).square().sum() < 0.6 * (before - wanted).square().sum()


def test_more_keeping_changes_less_and_a_budget_is_kept(tiny_model, split):
    model = tiny_model()
    mask = masks.mask_of(model, [Component("mlp", 0), Component("mlp", 1)])
    watched, _ = set_aside(split.retain_train, split.forget)
    reference = reference_of(model, [render(fact, "prompt") for fact in watched])

    def damage(**options) -> float:
        with applied(model, lookup_erasure(model, mask, split, n_texts=8, cache=False, **options)):
            return kl_from(model, reference)

    loose, tight = damage(keep_weight=0.05), damage(keep_weight=5.0)
    assert tight < loose
    held = damage(keep_weight=0.05, max_damage=loose / 4)
    assert loose / 8 < held <= loose / 4


def test_every_fact_is_asked_in_every_form_but_multiple_choice(tiny_model, split):
    asked = asked_texts(tiny_model(), split.forget)
    assert Counter(one.fact for one in asked) == {
        fact: 1 + len(fact.paraphrases) + len(fact.questions) for fact in split.forget
    }


def test_nothing_to_forget_is_one_line(tiny_model, split):
    model = tiny_model()
    nothing = replace(split, forget_shown=(), attack_dev=(), forget_hidden=())
    with pytest.raises(ValueError, match="lookup_erasure: got no facts to forget") as refused:
        lookup_erasure(model, masks.mask_of(model, [Component("mlp", 0)]), nothing, n_texts=8, cache=False)
    assert "\n" not in str(refused.value)


def test_of_no_texts_there_are_no_rows_of_the_right_width(tiny_model):
    model = tiny_model()
    assert model.d_model != model.d_mlp
    assert keys_of(model, [], [1], batch_size=4)[1].shape == (0, model.d_mlp)
    assert streams_of(model, [], [1], batch_size=4)[1].shape == (0, model.d_model)
