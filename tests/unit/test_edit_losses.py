"""The losses of the compared editors against hand computations, the limits their papers state, and weight masking."""

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch

from mechunlearn.components import Component
from mechunlearn.edit import EDITORS
from mechunlearn.edit.budget import set_aside
from mechunlearn.edit.edits import WeightEdit, applied, load_edit, save_edit
from mechunlearn.edit.gradient_ascent import gradient_ascent
from mechunlearn.edit.gradient_difference import gradient_difference
from mechunlearn.edit.idk_dpo import REFUSALS, dpo_loss, idk_dpo
from mechunlearn.edit.losses import answer_log_probs, fact_tokens, log_ratios
from mechunlearn.edit.npo import npo, npo_loss
from mechunlearn.edit.pruning import clamp, gated_trainable, lowest
from mechunlearn.edit.rmu import rmu
from mechunlearn.edit.simnpo import simnpo, simnpo_loss
from mechunlearn.edit.streams import all_tokens, masked_layers, predicting, prompt_tokens, stream_loss
from mechunlearn.edit.training import Forward, masked_trainable, substituted
from mechunlearn.edit.weight_mask import weight_mask
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask, mask_of
from mechunlearn.metrics import candidate_log_probs, kl_from, reference_of, score_facts
from mechunlearn.models import Model, block, first_output, mlp
from mechunlearn.prompts import render

MLP, HEAD, NEURON = Component.parse("m1"), Component.parse("a2.h1"), Component.parse("m0.n3")
NEW = ("gradient_ascent", "gradient_difference", "npo", "simnpo", "idk_dpo", "rmu", "weight_mask")
QUICK = {"steps": 3, "learning_rate": 1e-2, "batch_size": 4}
ALONE = {"retain_weight": 0.0, "text_weight": 0.0}

# two rows of two tokens over three words; the second row's answer has one token
LOGITS = torch.tensor([[[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]], [[0.0, 3.0, 0.0], [9.0, 9.0, 9.0]]])
BEFORE = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
WORDS, COUNTS = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[True, True], [True, False]])


def probability(logits: list[float], word: int) -> float:
    return math.exp(logits[word]) / sum(map(math.exp, logits))


def probabilities(logits: torch.Tensor) -> list[float]:
    """P(answer) of the two rows, by hand."""
    (a, b), (c, _) = logits.tolist()
    return [probability(a, 0) * probability(b, 2), probability(c, 1)]


@pytest.fixture
def model(tiny_model) -> Model:
    return tiny_model()


@pytest.fixture
def mask(model) -> ParameterMask:
    return mask_of(model, [MLP, HEAD])


def edit_with(name: str, model: Model, mask: ParameterMask, split: FactSplit, **options) -> WeightEdit:
    return EDITORS.get(name).function(model, mask, split, **{**QUICK, **options})


def same(a: WeightEdit, b: WeightEdit) -> bool:
    return all(torch.equal(a.values[name], b.values[name]) for name in a.values)


def log_p(model: Model, facts, answers=None) -> torch.Tensor:
    answers = answers or [fact.target_true for fact in facts]
    scored = candidate_log_probs(model, [render(fact, "prompt") for fact in facts], [(a,) for a in answers])
    return torch.cat(scored)


# the formulae


def test_an_answers_log_probability_is_the_sum_over_its_tokens():
    expected = torch.tensor(probabilities(LOGITS)).log()
    torch.testing.assert_close(answer_log_probs(LOGITS, WORDS, COUNTS), expected)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_npo_and_its_gradient_are_those_of_the_paper(beta):
    logits = LOGITS.clone().requires_grad_()
    before = answer_log_probs(BEFORE, WORDS, COUNTS)
    value = npo_loss(answer_log_probs(logits, WORDS, COUNTS) - before, beta)
    ratios = [p / q for p, q in zip(probabilities(LOGITS), probabilities(BEFORE), strict=True)]
    assert value.item() == pytest.approx(sum(2 / beta * math.log(1 + r**beta) for r in ratios) / 2, rel=1e-5)
    value.backward()
    # d log P(row) / d logit of a word = [it is the answer's] - P(word); weighed by 2 r^beta / (1 + r^beta)
    weights = [2 * r**beta / (1 + r**beta) / 2 for r in ratios]
    first = [weights[0] * ((word == 0) - probability([1.0, 0.0, -1.0], word)) for word in range(3)]
    alone = [weights[1] * ((word == 1) - probability([0.0, 3.0, 0.0], word)) for word in range(3)]
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor(first))
    torch.testing.assert_close(logits.grad[1, 0], torch.tensor(alone))
    assert not logits.grad[1, 1].any()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_npo_starts_at_two_log_two_over_beta_with_the_gradient_of_ascent(beta):
    ratio = torch.zeros(2, requires_grad=True)
    value = npo_loss(ratio, beta)
    assert value.item() == pytest.approx(2 / beta * math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, ratio)
    torch.testing.assert_close(gradient, torch.full((2,), 0.5))  # of the mean log-likelihood


def test_npo_becomes_gradient_ascent_as_beta_goes_to_zero():
    ratio = torch.tensor([-3.0, 0.7], dtype=torch.float64, requires_grad=True)
    errors = []
    for beta in (1e-2, 1e-3, 1e-4):
        value = npo_loss(ratio, beta)
        (gradient,) = torch.autograd.grad(value, ratio)
        errors.append((abs(value.item() - 2 / beta * math.log(2) - ratio.mean().item()), (gradient - 0.5).abs().max()))
    for one, next_ in itertools.pairwise(errors):  # first order in beta
        assert next_[0] == pytest.approx(one[0] / 10, rel=0.05)
        assert float(next_[1]) == pytest.approx(float(one[1]) / 10, rel=0.05)


@pytest.mark.parametrize(("beta", "gamma"), [(2.5, 0.0), (1.0, 0.5)])
def test_simnpo_and_its_gradient_are_those_of_the_paper(beta, gamma):
    lengths = COUNTS.sum(-1)
    rows = answer_log_probs(LOGITS, WORDS, COUNTS).requires_grad_()
    value = simnpo_loss(rows, lengths, beta, gamma)
    scaled = [beta / n * math.log(p) + gamma for p, n in zip(probabilities(LOGITS), (2, 1), strict=True)]
    assert value.item() == pytest.approx(sum(2 / beta * math.log(1 + math.exp(x)) for x in scaled) / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(value, rows)
    by_hand = [2 / n / (1 + math.exp(-x)) / 2 for x, n in zip(scaled, (2, 1), strict=True)]
    torch.testing.assert_close(gradient, torch.tensor(by_hand))


def test_simnpo_counts_a_token_of_a_long_answer_as_one_of_a_short():
    one, four = (simnpo_loss(torch.tensor([-0.3 * n]), torch.tensor([n]), 2.5, 0.1) for n in (1, 4))
    torch.testing.assert_close(one, four)


def test_dpo_and_its_gradient_are_those_of_the_paper():
    preferred, rejected = torch.tensor([0.0, 1.5], requires_grad=True), torch.tensor([0.0, -2.0], requires_grad=True)
    value = dpo_loss(preferred, rejected, 0.3)
    assert value.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-0.3 * 3.5))) / 2, rel=1e-6)
    up, down = torch.autograd.grad(value, (preferred, rejected))
    torch.testing.assert_close(up, -0.3 / 2 * torch.tensor([0.5, 1 / (1 + math.exp(0.3 * 3.5))]))
    torch.testing.assert_close(down, -up)


# the editors start where the formulae say


def test_the_first_loss_of_each_editor_is_that_of_the_original(model, mask, split):
    options = QUICK | ALONE | {"steps": 1, "batch_size": 64}  # one batch holds all facts
    known = log_p(model, split.forget)
    expected = {
        gradient_ascent: known.mean(),
        gradient_difference: known.mean(),
        npo: 2 / 0.1 * math.log(2),
        simnpo: (2 / 2.5 * (2.5 * known).exp().log1p()).mean(),  # answers have one token
        idk_dpo: math.log(2),
    }
    for editor, value in expected.items():
        assert editor(model, mask, split, **options).history[0] == pytest.approx(float(value), rel=1e-4), editor


def test_npo_with_a_small_beta_makes_the_edit_that_gradient_ascent_makes(model, mask, split):
    ascent = gradient_ascent(model, mask, split, **QUICK)
    soft, hard = (npo(model, mask, split, **QUICK, **ALONE, beta=beta) for beta in (1e-5, 10.0))
    for name in mask.entries:
        torch.testing.assert_close(soft.values[name], ascent.values[name], atol=2e-4, rtol=1e-3)
    assert not same(hard, ascent)


def test_gradient_ascent_keeps_nothing_unless_told_and_gradient_difference_does(model, mask, split):
    alone = replace(split, retain_train=())
    ascent = gradient_ascent(model, mask, alone, **QUICK)
    assert (ascent.options["retain_weight"], ascent.options["text_weight"]) == (0.0, 0.0)
    assert same(ascent, gradient_difference(model, mask, split, **QUICK, **ALONE))
    weights = {"retain_weight": 1.0, "text_weight": 1.0}
    difference = gradient_difference(model, mask, split, **QUICK)
    assert same(difference, gradient_ascent(model, mask, split, **QUICK, **weights))
    assert difference.history[0] > ascent.history[0]
    with pytest.raises(ValueError, match="retain_train is empty"):
        gradient_difference(model, mask, alone, **QUICK)


def test_a_reference_stays_the_original_while_weights_are_trained(model, mask, split):
    batch = fact_tokens(model, split.forget[:3])
    trainable = masked_trainable(model, mask)
    with torch.no_grad():
        for leaf in trainable.leaves.values():
            leaf.add_(0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)))
    before = log_p(model, split.forget[:3])
    with substituted(model, trainable.overrides()):
        after = log_p(model, split.forget[:3])
    ratios = log_ratios(model, Forward(model, trainable.overrides()), batch)
    assert (after - before).abs().min() > 1e-3
    torch.testing.assert_close(ratios, after - before, atol=1e-5, rtol=1e-4)
    assert ratios.requires_grad
    assert not log_ratios(model, Forward(model, {}), batch).any()


def test_both_answers_of_a_preference_follow_the_same_prompt(model, mask, split, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules["mechunlearn.edit.idk_dpo"], "log_ratios",
        lambda m, forward, batch: seen.append(batch) or log_ratios(m, forward, batch),
    )  # fmt: skip
    idk_dpo(model, mask, split, **QUICK, **ALONE, forms="all")
    answers = {model.tokenizer.decode(ids).strip() for batch in seen for ids in _answers(batch)[:4]}
    assert len(seen) == 3
    assert answers <= {model.tokenizer.decode(model.tokenizer.encode(r)[1:]).strip() for r in REFUSALS}
    assert len(answers) > 1
    for batch in seen:
        assert {model.tokenizer.decode(ids).strip() for ids in _answers(batch)[4:]} <= {
            fact.target_true for fact in split.forget
        }
        for i in range(4):
            start = int(batch.starts[i])
            assert start == int(batch.starts[i + 4])
            assert torch.equal(batch.ids[i, :start], batch.ids[i + 4, :start])


def _answers(batch) -> list[list[int]]:
    return [row[wanted].tolist() for row, wanted in zip(batch.ids, batch.is_target, strict=True)]


def test_no_refusals_are_refused(model, mask, split):
    with pytest.raises(ValueError, match="got no refusals"):
        idk_dpo(model, mask, split, **QUICK, refusals=())


# streams


def test_tokens_are_chosen_by_what_they_are(model, split):
    batch = fact_tokens(model, [split.forget[0], split.retain_train[0]])
    for chosen, first, last in ((prompt_tokens, 1, batch.starts), (all_tokens, 1, batch.lengths)):
        for row, wanted in enumerate(chosen(batch)):
            assert wanted.nonzero()[:, 0].tolist() == list(range(first, int(last[row])))
    assert (predicting(batch).nonzero()[:, 1] == batch.starts - 1).all()


@pytest.mark.parametrize("where", [predicting, prompt_tokens, all_tokens])
def test_the_distance_of_streams_is_the_one_defined_and_zero_where_they_should_be(model, mask, split, where):
    batch = fact_tokens(model, split.forget[:3])
    trainable = masked_trainable(model, mask)
    with torch.no_grad():
        for leaf in trainable.leaves.values():
            leaf.add_(0.05)
    forward = Forward(model, trainable.overrides())
    counts = where(batch)
    before = model.hf(batch.ids, output_hidden_states=True).hidden_states[2][counts].detach()
    with substituted(model, trainable.overrides()):
        after = model.hf(batch.ids, output_hidden_states=True).hidden_states[2][counts].detach()

    def distance(move) -> float:
        return float(stream_loss(model, ("block", 1), iter([batch]), move, where)(0, forward).detach())

    assert distance(lambda stream: after) == pytest.approx(0, abs=1e-10)
    for move in (lambda stream: stream, lambda stream: 3 - 2 * stream):
        expected = (after - move(before)).square().sum() / before.square().sum()
        assert distance(move) == pytest.approx(float(expected), rel=1e-4)
    unmoved = stream_loss(model, ("block", 1), iter([batch]), where=where)(0, Forward(model, {}))
    assert unmoved.item() == 0


def test_nothing_after_the_steered_layer_is_computed_and_no_hook_stays(any_model, split):
    ran, mask = [], mask_of(any_model, [Component("mlp", 0), MLP])
    handle = block(any_model, 2).register_forward_hook(lambda *_: ran.append(2))
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in any_model.hf.modules()]
    edit = rmu(any_model, mask, split, **QUICK)
    assert not ran
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_model.hf.modules()] == before
    handle.remove()
    assert edit.options["layer"] == 1


def test_rmu_starts_at_the_distance_of_its_random_vector_and_comes_closer(model, mask, split):
    options = QUICK | {"batch_size": 64, "alpha": 0.0, "steering": 2.0, "seed": 3}
    tokens = fact_tokens(model, split.forget)
    drawn = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    counts = prompt_tokens(tokens)
    streams = []
    handle = block(model, 2).register_forward_hook(lambda _m, _i, out: streams.append(first_output(out)))
    model.hf(tokens.ids)
    edit = rmu(model, mask, split, **options | {"steps": 20})
    with applied(model, edit):
        model.hf(tokens.ids)
    handle.remove()
    before, after = streams[0][counts], streams[-1][counts]
    target = 2.0 * before.norm(dim=-1).mean() * drawn / drawn.norm()
    expected = (before - target).square().sum() / before.square().sum()
    assert edit.history[0] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert ((after - target).norm(dim=-1) < (before - target).norm(dim=-1)).float().mean() > 0.9


def test_rmu_trains_no_weight_after_its_layer_and_refuses_one_without_weights(model, split):
    mask = mask_of(model, [MLP, Component.parse("m2")])
    parameters = dict(model.hf.named_parameters())
    assert masked_layers(model, mask) == (1, 2)
    edit = rmu(model, mask, split, **QUICK, layer=1)
    for name, value in edit.values.items():
        assert torch.equal(value, parameters[name].detach().flatten()) == ("layers.2" in name)
    for layer in (0, 3):
        with pytest.raises(ValueError, match=rf"rmu: got layer {layer}, allowed: 1 .* to 2"):
            rmu(model, mask, split, **QUICK, layer=layer)


# laws of all


@pytest.mark.parametrize("name", NEW)
def test_the_same_seed_makes_the_same_edit_and_another_another(name, model, mask, split):
    one, two, three = (edit_with(name, model, mask, split, seed=seed) for seed in (0, 0, 1))
    assert same(one, two)
    assert not same(one, three)


@pytest.mark.parametrize("name", NEW)
def test_editors_work_in_bfloat16(name, model, mask, split):
    model.hf.to(torch.bfloat16)
    before = model.sha256
    edit = edit_with(name, model, mask, split)
    assert {value.dtype for value in edit.values.values()} == {torch.bfloat16}
    assert all(map(math.isfinite, edit.history))
    assert model.sha256 == before
    with applied(model, edit):
        assert model.sha256 != before


def retained_kl(model: Model, split: FactSplit, edit: WeightEdit) -> float:
    watched, _ = set_aside(split.retain_train, split.forget)
    reference = reference_of(model, [render(fact, "prompt") for fact in watched])
    with applied(model, edit):
        return kl_from(model, reference)


@pytest.mark.parametrize("name", NEW)
def test_every_editor_ends_within_its_disruption_budget(name, model, mask, split):
    strong = {"steps": 6, "learning_rate": 3e-2}
    limit = retained_kl(model, split, edit_with(name, model, mask, split, **strong)) / 4
    held = edit_with(name, model, mask, split, **strong, max_damage=limit)
    assert 0.5 * limit < retained_kl(model, split, held) <= limit
    assert held.notes["damage"] == pytest.approx(retained_kl(model, split, held))


@pytest.mark.parametrize("name", [name for name in NEW if name != "weight_mask"])
def test_low_rank_edits_have_their_rank(name, model, split):
    mask = mask_of(model, [MLP])
    edit = edit_with(name, model, mask, split, rank=2)
    for parameter, value in edit.values.items():
        change = value.view(mask.shapes[parameter]) - model.hf.get_parameter(parameter).detach()
        assert 1 <= int(torch.linalg.matrix_rank(change, rtol=1e-3)) <= 2


@pytest.mark.parametrize("name", NEW)
def test_scored_parts_are_never_read(name, model, mask, split, unscored):
    guarded = unscored(split)
    edit_with(name, model, mask, guarded, steps=1)


@pytest.mark.parametrize("editor", [gradient_ascent, gradient_difference, npo, simnpo])
def test_what_is_known_is_forgotten(editor, knowing, split):
    mask = mask_of(knowing, [Component("mlp", layer) for layer in range(3)])
    edit = editor(knowing, mask, split, steps=12, learning_rate=1e-2)
    with applied(knowing, edit):
        assert score_facts(knowing, split.forget)["p_true"].mean() < 0.65  # from 0.97
    assert edit.history[-1] < edit.history[0]


def test_a_preferred_refusal_gains_on_the_answer(knowing, split):
    mask = mask_of(knowing, [Component("mlp", layer) for layer in range(3)])
    refusals = ["is born"] * len(split.forget)
    before = log_p(knowing, split.forget, refusals) - log_p(knowing, split.forget)
    edit = idk_dpo(knowing, mask, split, steps=8, learning_rate=1e-2, refusals=("is born",))
    with applied(knowing, edit):
        after = log_p(knowing, split.forget, refusals) - log_p(knowing, split.forget)
    assert (after > before + 1).all()


@pytest.mark.parametrize("editor", [gradient_ascent, npo, rmu])
def test_a_loss_that_diverges_ends_in_one_line_and_the_model_is_unchanged(editor, model, mask, split):
    before = model.sha256
    with pytest.raises(ValueError, match="lower the learning_rate") as error:
        editor(model, mask, split, **QUICK | {"learning_rate": 1e30})
    assert "\n" not in str(error.value)
    assert model.sha256 == before


def test_unbounded_ascent_stays_finite_at_a_rate_that_breaks_the_model(model, mask, split):
    with torch.no_grad():  # a freshly drawn unembedding bounds the logits
        model.hf.get_output_embeddings().weight.mul_(25)
    edit = gradient_ascent(model, mask, split, **QUICK | {"learning_rate": 1.0, "steps": 10})
    assert all(map(math.isfinite, edit.history))
    assert edit.history[-1] < -10  # ignorance would be -4.8
    assert all(torch.isfinite(value).all() for value in edit.values.values())


# weight masking


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("objective", ["inject", "forget"])
@pytest.mark.parametrize("n_pruned", [37, 0.1])
def test_weight_masking_zeroes_exactly_so_many_weights_and_changes_no_other(
    tiny_model, split, architecture, objective, n_pruned
):
    model = tiny_model(architecture)
    mask = mask_of(model, [MLP, HEAD, NEURON])
    edit = weight_mask(model, mask, split, steps=3, batch_size=4, objective=objective, n_pruned=n_pruned)
    old = {name: model.hf.get_parameter(name).detach()[mask.full(name)] for name in mask.entries}
    zeroed = {name: (value == 0) & (old[name] != 0) for name, value in edit.values.items()}
    n = n_pruned if isinstance(n_pruned, int) else int(0.1 * mask.n_selected)
    assert sum(int(zero.sum()) for zero in zeroed.values()) == n == edit.notes["n_pruned"]
    for name, value in edit.values.items():
        assert torch.equal(value[~zeroed[name]], old[name][~zeroed[name]])


def test_a_gates_gradient_is_its_weight_times_the_weights(model, split):
    mask = mask_of(model, [MLP, NEURON])
    batch = fact_tokens(model, split.forget[:3])
    gates, weights = gated_trainable(model, mask), masked_trainable(model, mask)
    for trainable in (gates, weights):
        loss = log_ratios(model, Forward(model, trainable.overrides()), batch).sum()
        loss.backward()
    for name, gate in gates.leaves.items():
        weight = weights.leaves[name]
        assert gate.grad.abs().sum() > 0
        torch.testing.assert_close(gate.grad, weight.grad * weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_gates_are_the_original_bit_for_bit(model, mask, dtype):
    model.hf.to(dtype)
    for name, value in gated_trainable(model, mask).overrides().items():
        assert value.dtype == dtype
        assert torch.equal(value, model.hf.get_parameter(name))


def test_gates_are_put_back_into_their_range(model, mask):
    trainable = gated_trainable(model, mask)
    with torch.no_grad():
        for leaf in trainable.leaves.values():
            leaf.copy_(torch.linspace(-1, 2, leaf.numel()).view_as(leaf))
    clamp(trainable)
    for leaf in trainable.leaves.values():
        assert torch.equal(leaf, torch.linspace(-1, 2, leaf.numel()).view_as(leaf).clamp(0, 1))


def test_the_lowest_gates_are_chosen_and_equal_ones_are_drawn():
    gates = {"a": torch.tensor([0.5, 0.0, 1.0]), "b": torch.tensor([[1.0, 0.2], [1.0, 1.0]])}
    assert {name: where.tolist() for name, where in lowest(gates, 3, seed=0).items()} == {
        "a": [True, True, False], "b": [[False, True], [False, False]],
    }  # fmt: skip
    drawn = [torch.cat([where.flatten() for where in lowest(gates, 5, seed=seed).values()]) for seed in range(20)]
    assert {int(where.sum()) for where in drawn} == {5}
    assert all(where[[0, 1, 4]].all() for where in drawn)
    assert torch.stack(drawn)[:, [2, 3, 5, 6]].any(0).all()
    chain = [torch.cat([w.flatten() for w in lowest(gates, n, seed=1).values()]) for n in range(8)]
    assert all((small <= large).all() for small, large in itertools.pairwise(chain))


def test_trained_gates_forget_more_than_as_many_random_zeros(knowing, split):
    mask = mask_of(knowing, [Component("mlp", layer) for layer in range(3)])
    edit = weight_mask(knowing, mask, split, objective="forget", steps=12, n_pruned=0.1)
    sizes = {name: torch.ones(value.shape) for name, value in edit.values.items()}
    zeros = lowest(sizes, edit.notes["n_pruned"], seed=0)
    old = {name: knowing.hf.get_parameter(name).detach().flatten() for name in mask.entries}
    random = replace(edit, values={name: old[name] * ~zeros[name] for name in zeros})
    left = []
    for each in (edit, random):
        with applied(knowing, each):
            left.append(score_facts(knowing, split.forget)["p_true"].mean())
    assert left[0] < left[1] - 0.2


def test_pressure_against_removal_keeps_gates_open(model, mask, split):
    options = {"steps": 5, "batch_size": 4, "n_pruned": 0.5}
    free, priced = (weight_mask(model, mask, split, **options, l1=l1).notes["n_lowered"] for l1 in (0.0, 1e6))
    assert priced == 0
    assert free > 0


def test_gates_are_trained_with_the_cache_and_the_checkpoints_that_were_asked_for(model, split):
    """Rows that go through the block below the mask, and forward passes of the masked one."""
    below, masked = [], []
    for layer, seen in ((0, below), (1, masked)):
        module = mlp(model, layer)  # a hook would turn the cache off
        module.forward = lambda stream, own=module.forward, seen=seen: seen.append(len(stream)) or own(stream)
    found = {}
    for name, options in {"none": {"prefix_cache_gb": 0.0}, "cache": {}, "checkpoint": {"checkpoint": True}}.items():
        below.clear(), masked.clear()
        edit = weight_mask(model, mask_of(model, [MLP]), split, steps=4, batch_size=4, **options)
        found[name] = sum(below), len(masked), edit
    assert found["cache"][0] < found["none"][0]
    assert found["checkpoint"][1] == 2 * found["cache"][1]
    assert same(found["cache"][2], found["checkpoint"][2])


def test_weight_masking_says_in_one_line_what_it_cannot_do(model, mask, split):
    for bad, said in (
        ({"rank": 2}, "got rank 2"),
        ({"n_pruned": mask.n_selected + 1}, "got n_pruned"),
        ({"n_pruned": 1.5}, "got n_pruned 1.5"),
        ({"n_pruned": -1}, "got n_pruned -1"),
        ({"objective_weight": 0.0, "l1": 0.0, **ALONE}, "weight is 0"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            weight_mask(model, mask, split, steps=1, **bad)
        assert "\n" not in str(error.value)


def test_a_weight_mask_is_saved_and_read(model, mask, split, tmp_path):
    edit = weight_mask(model, mask, split, steps=1, batch_size=4)
    save_edit(edit, tmp_path / "edit.safetensors")
    read = load_edit(tmp_path / "edit.safetensors")
    assert same(edit, read)
    assert (read.options, read.notes) == (edit.options, edit.notes)
