"""An edit that is trained against an attacker: who sees which facts, what moves, what it costs to ask for nothing."""

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mechunlearn.components import Component
from mechunlearn.edit.inject import inject
from mechunlearn.edit.losses import answer_loss, fact_tokens, predict
from mechunlearn.edit.resistant_inject import _Attacker, resistant_inject
from mechunlearn.edit.training import Forward, masked_trainable, substituted
from mechunlearn.masks import mask_of

OPTIONS = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "seed": 3}


def mlps(model, *layers):
    return mask_of(model, [Component("mlp", layer) for layer in layers])


def attacker_on(model, split, rank=None):
    return _Attacker.of(
        model, split.forget, fact_tokens(model, split.retain_train), 4, "prompt", 1e-2, rank, random.Random(0)
    )


def rows_of(batches, n):
    return {tuple(row.tolist()) for batch in islice(batches, n) for row in batch.ids}


def test_an_attack_that_weighs_nothing_leaves_the_plain_injection(tiny_model, split):
    model = tiny_model()
    plain = inject(model, mlps(model, 1), split, **OPTIONS, forms="all", retain_weight=3.0, prefix_cache_gb=0.0)
    ours = resistant_inject(model, mlps(model, 1), split, **OPTIONS, resist_weight=0.0)
    for name, value in plain.values.items():
        assert torch.equal(value, ours.values[name])
    attacked = resistant_inject(model, mlps(model, 1), split, **OPTIONS)
    assert any(not torch.equal(value, attacked.values[name]) for name, value in plain.values.items())


def test_attackers_step_once_a_step_however_many_batches_it_has(tiny_model, split, monkeypatch):
    steps, own = [], _Attacker.step
    monkeypatch.setattr(_Attacker, "step", lambda attacker, edited: steps.append(attacker) or own(attacker, edited))
    model = tiny_model()
    resistant_inject(model, mlps(model, 1), split, **OPTIONS, accumulation=3, attack_steps=2)
    assert len(steps) == OPTIONS["steps"]
    assert [len({id(a) for a in steps[i : i + 2]}) for i in (0, 2)] == [1, 1]
    assert steps[0] is not steps[2]


@pytest.mark.parametrize("rank", [None, 2])
def test_an_attacker_relearns_what_it_is_shown_and_leaves_the_edited_model_alone(any_model, split, rank):
    model = any_model
    model.hf.requires_grad_(False)  # as `train` does
    trainable = masked_trainable(model, mlps(model, 1))
    edited, before = Forward(model, trainable.overrides()), model.sha256
    attacker = attacker_on(model, split, rank)
    shown = next(attacker.shown)
    shifts = [attacker.step(edited.detached()) for _ in range(12)]
    losses = [answer_loss(*predict(edited.shifted(s), shown)).item() for s in (shifts[0], shifts[-1])]
    assert losses[1] < losses[0]
    assert model.sha256 == before
    assert all(leaf.grad is None for leaf in trainable.leaves.values())
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_what_an_attacker_is_judged_by_it_is_not_shown(tiny_model, split):
    model, attacker = tiny_model(), attacker_on(tiny_model(), split)
    kept = {tuple(row.tolist()) for row in fact_tokens(model, split.retain_train).ids}

    def prompts(rows):
        return {tuple(token for token in row if token)[:-1] for row in rows}

    shown, hidden = rows_of(attacker.shown, 30), rows_of(attacker.hidden, 30)
    assert not prompts(shown) & prompts(hidden)
    asked = prompts(tuple(row.tolist()) for row in fact_tokens(model, split.forget).ids)
    assert prompts(hidden) <= asked
    assert len(asked & prompts(shown)) == len(split.forget) // 2
    assert prompts(shown) - asked <= prompts(kept)


def test_a_shifted_forward_is_the_pass_of_the_sum(any_model):
    model = any_model
    model.hf.requires_grad_(False)
    trainable = masked_trainable(model, mlps(model, 1))
    with torch.no_grad():
        for leaf in trainable.leaves.values():
            leaf.add_(0.1)
    own = dict(model.hf.named_parameters())
    inside, outside = next(iter(trainable.leaves)), next(iter(mask_of(model, [Component("attention", 0)]).entries))
    by = {name: torch.full_like(own[name], 0.05) for name in (inside, outside)}
    ids, at = torch.tensor([[1, 2, 3, 4]]), torch.tensor([3])
    forward = Forward(model, trainable.overrides())
    found = forward.shifted(by)(ids, at)
    summed = trainable.overrides() | {outside: own[outside].detach()}
    with torch.no_grad(), substituted(model, {n: v.detach() + by.get(n, 0) for n, v in summed.items()}):
        expected = model.hf(ids).logits[:, 3:]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert trainable.leaves[inside].grad is not None
    assert not forward.detached()(ids, at).requires_grad


def test_what_cannot_be_attacked_is_refused(tiny_model, split):
    model = tiny_model()
    with pytest.raises(ValueError, match="checkpoint"):
        resistant_inject(model, mlps(model, 1), split, checkpoint=True)
    one = replace(split, forget_shown=split.forget[:1], attack_dev=(), forget_hidden=())
    with pytest.raises(ValueError, match="got 1 facts to forget"):
        resistant_inject(model, mlps(model, 1), one)
