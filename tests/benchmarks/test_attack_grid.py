"""The settings of a relearning grid (several learning rates of one kind): one after another, batched, or side by side.

Batched: the weights of all settings stacked, one vmap over gradients and one optimizer step. By count of operations it
can only save overhead, for every setting has weights, hence products, of its own. Side by side: two processes of one
thread. Ratios within one run, never times: pytest -m benchmark tests/benchmarks -s
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import islice

import pytest
import torch
from torch.func import grad, vmap

from mechunlearn.checkpoints import load_model
from mechunlearn.edit.losses import Term, answer_loss, batches, fact_tokens, joined, weighted_sum
from mechunlearn.edit.training import lora_trainable, masked_trainable, train
from mechunlearn.facts import split_facts
from mechunlearn.masks import mask_of
from mechunlearn.models import all_components
from mechunlearn.organisms.forget_sets import load_forget_set

pytestmark = pytest.mark.benchmark

RATES, STEPS, REPEATS = (1e-4, 3e-4, 1e-3, 3e-3), 3, 5


@cache
def cell(attention):
    """The bundled organism, and batches as `relearning` makes them by default."""
    torch.set_num_threads(1)
    model = load_model("atlas")
    model.hf.set_attn_implementation(attention)
    model.hf.requires_grad_(False)
    split = split_facts(*load_forget_set("people-256"), seed=0)
    pools = [fact_tokens(model, facts) for facts in (split.forget_shown, split.retain_train)]
    return model, list(islice(joined(*(batches(pool, 24, seed=i) for i, pool in enumerate(pools))), STEPS))


def trainable(model, kind):
    return (
        lora_trainable(model, 8) if kind == "lora:8" else masked_trainable(model, mask_of(model, all_components(model)))
    )


def loss_on(drawn):
    return weighted_sum([Term(weight=1.0, objective=answer_loss, batches=iter(drawn))])


def one_after_another(kind, rates=RATES):
    """Trained leaves of each rate, as `relearning` trains them; also what each of two processes runs."""
    model, drawn = cell("sdpa")
    made = [trainable(model, kind) for _ in rates]
    for one, rate in zip(made, rates, strict=True):
        train(model, one, loss_on(drawn), steps=STEPS, learning_rate=rate, schedule="constant", clip=1e9)
    return [{name: leaf.detach() for name, leaf in one.leaves.items()} for one in made]


def batched(kind, attention):
    model, drawn = cell(attention)
    one = trainable(model, kind)
    stacked = {name: torch.stack([leaf.detach()] * len(RATES)) for name, leaf in one.leaves.items()}
    rates = {name: torch.tensor(RATES).view(-1, *[1] * leaf.ndim) for name, leaf in one.leaves.items()}
    first, second = ({name: torch.zeros_like(leaf) for name, leaf in stacked.items()} for _ in range(2))
    for step, batch in enumerate(drawn, start=1):
        loss = loss_on([batch])

        def value(leaves, loss=loss):
            def forward(ids, kept):
                options = {"use_cache": False, "logits_to_keep": kept}
                made = one.compute(leaves)
                return torch.func.functional_call(model.hf, made, (ids,), options, tie_weights=False).logits

            return loss(0, forward)

        for name, gradient in vmap(grad(value))(stacked).items():  # AdamW without decay
            first[name].lerp_(gradient, 0.1)
            second[name].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            scale = (second[name] / (1 - 0.999**step)).sqrt_().add_(1e-8)
            stacked[name] -= rates[name] * (first[name] / (1 - 0.9**step)) / scale
    return [{name: leaf[i] for name, leaf in stacked.items()} for i in range(len(RATES))]


def paired(one, other, clock):
    """Median over repeats, in alternating order, of the ratio of the time of `one` to that of `other`."""
    one(), other()
    ratios = []
    for i in range(REPEATS):
        taken = {}
        for call in (one, other) if i % 2 else (other, one):
            start = clock()
            call()
            taken[call] = clock() - start
        ratios.append(taken[one] / taken[other])
    return statistics.median(ratios)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["full", "lora:8"])
def test_a_batched_grid_is_no_faster_than_one_setting_after_another(kind, attention, record_property):
    start = trainable(cell("sdpa")[0], kind).leaves
    for loop, batch in zip(one_after_another(kind), batched(kind, attention), strict=True):
        for name, leaf in loop.items():  # the same training, or the times say nothing; single entries are Adam's noise
            assert (leaf - batch[name]).norm() < 0.05 * (leaf - start[name]).norm()
    ratio = paired(lambda: one_after_another(kind), lambda: batched(kind, attention), time.process_time)
    record_property("ratio", ratio)
    print(f"{kind}, {len(RATES)} rates, {attention}: one after another / batched {ratio:.2f}")  # noqa: T201
    assert ratio < 1.3  # from here on batching would be worth its code


def test_two_processes_against_one(record_property):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:

        def side_by_side():
            list(pool.map(one_after_another, ["full"] * 2, [RATES[:2], RATES[2:]]))

        ratio = paired(lambda: one_after_another("full"), side_by_side, time.perf_counter)
    record_property("ratio", ratio)
    print(f"full, {len(RATES)} rates: one process / two processes {ratio:.2f}")  # noqa: T201
    assert ratio > 0.5  # at worst (no second core is free) little is lost
