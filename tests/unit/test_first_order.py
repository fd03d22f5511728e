"""First-order scores: streaming, neurons, integrated gradients, relevance rules, AtP*."""

import numpy as np
import pytest
import torch
from torch import nn

from mechunlearn.activations import hooked, last_logits, untouched
from mechunlearn.components import Component
from mechunlearn.localize.atp_star import _scores as atp_star_scores
from mechunlearn.localize.attention_record import Attended, head_effects, recorded_attention
from mechunlearn.localize.attribution_patching import attribution_patching
from mechunlearn.localize.backward_rules import RULES, relevance_rules
from mechunlearn.localize.first_order import between, by_role, difference, first_order_scores, midpoints, run
from mechunlearn.localize.integrated_gradients import integrated_gradients, over_activations, over_inputs
from mechunlearn.localize.pairs import build_pairs, fact_means, to_batch
from mechunlearn.localize.relevance_patching import relevance_patching
from mechunlearn.localize.streamed import streamed_scores
from mechunlearn.models import Model, NotSupported, all_components, mlp, stream_norms

KINDS = ("mlp", "attention", "head", "neuron")


@pytest.fixture(scope="module")
def facts(tiny_facts):
    return tiny_facts.facts[:8]


def a_batch(model, facts, *, same_length=False):
    pairs = build_pairs(model, facts)
    if same_length:
        pairs = [p for p in pairs if len(p.clean) == len(p.corrupt) == len(pairs[0].clean)]
    return to_batch(model, pairs)


@pytest.fixture
def double(tiny_model):
    model = tiny_model("llama")
    model.hf.double()
    return model


# --- one block at a time ---


@pytest.mark.parametrize(
    ("form", "rules"), [("denoise", ()), ("noise", ()), ("both", ()), ("denoise", RULES), ("both", RULES)]
)
def test_streamed_scores_are_the_same(any_model: Model, facts, form, rules) -> None:
    batch, components = a_batch(any_model, facts), all_components(any_model, KINDS)
    with untouched(any_model), relevance_rules(any_model, rules):
        plain = first_order_scores(any_model, batch, components, form)
        streamed = streamed_scores(any_model, batch, components, form)
    for expected, found in zip(plain, streamed, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not any("forward" in module.__dict__ for module in any_model.hf.modules())


def test_an_error_on_the_way_leaves_no_block_skipped(tiny_model, facts, monkeypatch) -> None:
    model = tiny_model("gpt2")
    batch = a_batch(model, facts)

    def fails(*_args, **_named):
        raise RuntimeError("no memory")

    with untouched(model), torch.no_grad():
        before = last_logits(model, batch.clean)
    monkeypatch.setattr(type(model.hf.lm_head), "forward", fails)
    with pytest.raises(RuntimeError, match="no memory"), untouched(model):
        streamed_scores(model, batch, all_components(model), "denoise")
    monkeypatch.undo()
    with untouched(model), torch.no_grad():
        torch.testing.assert_close(last_logits(model, batch.clean), before)


# --- neurons ---


def test_neurons_sum_to_their_mlps_score(any_model: Model, facts) -> None:
    if any_model.architecture.mlp_write != any_model.architecture.mlp:
        pytest.skip("a norm stands between the neurons and the stream, so first-order effects differ by design")
    components = all_components(any_model, ("mlp", "neuron"))
    with untouched(any_model):
        scores, *_ = first_order_scores(any_model, a_batch(any_model, facts), components, "denoise")
    for layer in range(any_model.n_layers):
        neurons = [i for i, c in enumerate(components) if c.kind == "neuron" and c.layer == layer]
        assert len(neurons) == any_model.d_mlp
        whole = scores[:, components.index(Component("mlp", layer))]
        torch.testing.assert_close(scores[:, neurons].sum(1), whole, atol=1e-5, rtol=1e-3)


# --- integrated gradients ---


def test_over_inputs_the_stream_before_the_first_block_accounts_for_the_whole_difference(double, facts) -> None:
    batch = a_batch(double, facts, same_length=True)
    place = ("stream", 0)
    with untouched(double):
        embedded = []
        clean = run(double, batch, batch.clean, [place], gradient=False, change=lambda e: embedded.append(e) or e)
        corrupt = run(double, batch, batch.corrupt, [place], gradient=False, change=lambda e: embedded.append(e) or e)
        gaps = []
        for steps in (4, 40):
            total = 0
            for share in midpoints(steps):
                point = between(batch, *embedded, share)
                at = run(double, batch, batch.corrupt, [place], gradient=True, change=lambda _, p=point: p)
                total = total + batch.take(at.gradients[place], batch.corrupt_positions) / steps
            moved = difference(batch, clean.activations[place], corrupt.activations[place])
            found = by_role(double, batch, place, total * moved).sum((1, 2))
            gaps.append((found - (clean.metric - corrupt.metric)).abs().max() / clean.metric.abs().max())
    assert gaps[1] < 2e-3
    assert gaps[1] < gaps[0] / 10


def test_over_activations_approaches_the_exact_effect(double, facts) -> None:
    batch = a_batch(double, facts)
    components = all_components(double)
    with untouched(double):
        scores, _, corrupt = over_activations(double, batch, components, 60)
        places = [(c.kind, c.layer) for c in components]
        with torch.no_grad():
            with hooked(double, record=places) as clean:
                last_logits(double, batch.clean)
            with hooked(double, record=places) as base:
                last_logits(double, batch.corrupt)
            for row, place in enumerate(places):
                whole = between(batch, clean[place], base[place], 1.0)
                with hooked(double, change={place: lambda _, whole=whole: whole}):
                    exact = batch.logit_diff(last_logits(double, batch.corrupt)) - corrupt
                torch.testing.assert_close(scores[:, row].sum(1), exact, atol=2e-3, rtol=2e-3)


def test_the_ways_ends_are_the_two_runs(double, facts) -> None:
    batch = a_batch(double, facts, same_length=True)
    clean = torch.randn(*batch.clean.ids.shape, 5)
    corrupt = torch.randn(*batch.corrupt.ids.shape, 5)
    torch.testing.assert_close(between(batch, clean, corrupt, 0.0), corrupt)
    torch.testing.assert_close(between(batch, clean, corrupt, 1.0), clean)


def test_two_identical_runs_score_nothing_over_inputs(double, facts) -> None:
    batch, components = a_batch(double, facts, same_length=True), all_components(double)
    near = batch.__class__(**{**batch.__dict__, "corrupt": batch.clean, "corrupt_positions": batch.clean_positions})
    with untouched(double):
        scores, *_ = over_inputs(double, near, components, 1)
    assert not scores.any()


# --- relevance rules ---


def test_the_rules_leave_the_forward_pass_as_it_is(any_model: Model, facts) -> None:
    batch = a_batch(any_model, facts)
    with untouched(any_model), torch.no_grad():
        before = last_logits(any_model, batch.clean)
        with relevance_rules(any_model):
            assert torch.equal(last_logits(any_model, batch.clean), before)
        assert torch.equal(last_logits(any_model, batch.clean), before)


def test_under_the_rules_every_norm_and_every_gated_mlp_is_linear(any_model: Model) -> None:
    """Euler: of a map that is linear (up to its bias) the gradient times the input is the output."""
    norms = [module for module in any_model.hf.modules() if "Norm" in type(module).__name__]
    generator = torch.Generator().manual_seed(0)
    with untouched(any_model), relevance_rules(any_model):
        for module in norms:
            x = torch.randn(4, module.weight.shape[0], generator=generator).requires_grad_()
            output = module(x)
            bias = getattr(module, "bias", None)
            expected = output.sum(-1) - (0 if bias is None else bias.sum())
            (gradient,) = torch.autograd.grad(output.sum(), x)
            torch.testing.assert_close((gradient * x).sum(-1), expected, atol=1e-4, rtol=1e-4)
        if len(any_model.architecture.mlp_in) == 2:
            x = torch.randn(4, any_model.d_model, generator=generator).requires_grad_()
            output = mlp(any_model, 0)(x)
            (gradient,) = torch.autograd.grad(output.sum(), x)
            torch.testing.assert_close((gradient * x).sum(-1), output.sum(-1), atol=1e-4, rtol=1e-4)


def test_without_the_rules_that_law_does_not_hold(tiny_model) -> None:
    module = tiny_model("llama").hf.model.norm
    x = torch.randn(4, module.weight.shape[0]).requires_grad_()
    output = module(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert not torch.allclose((gradient * x).sum(-1), output.sum(-1), atol=1e-2)


def test_relevance_patching_streams_and_without_rules_is_attribution_patching(double, facts) -> None:
    plain, streamed = (relevance_patching(double, facts, streamed=streamed) for streamed in (False, True))
    np.testing.assert_allclose(streamed.per_fact, plain.per_fact, rtol=1e-9, atol=1e-9)
    assert streamed.options["streamed"]
    without = relevance_patching(double, facts, rules=()).per_fact
    assert np.array_equal(without, attribution_patching(double, facts).per_fact)
    assert not np.allclose(without, plain.per_fact)


@pytest.mark.parametrize("over", ["inputs", "activations"])
def test_integrated_gradients_without_rules_are_plain_and_with_some_follow_them(double, facts, over) -> None:
    batch, components = a_batch(double, facts), all_components(double)
    scores = over_inputs if over == "inputs" else over_activations

    def by_hand():
        with untouched(double):
            return fact_means(len(facts), [(batch, scores(double, batch, components, 3)[0])])

    found = integrated_gradients(double, facts, over=over, steps=3)
    assert np.array_equal(found.per_fact, by_hand())
    with relevance_rules(double, ("norms",)):
        expected = by_hand()
    found = integrated_gradients(double, facts, over=over, steps=3, rules=("norms",))
    assert np.array_equal(found.per_fact, expected)
    assert found.options["rules"] == ["norms"]


def test_one_step_under_the_rules_is_their_gradient_halfway_between_the_runs(double, facts) -> None:
    batch, places = a_batch(double, facts, same_length=True), [("mlp", 1), ("attention", 2)]
    of_pairs = [facts[pair.fact] for pair in batch.pairs]
    found = integrated_gradients(double, facts, steps=1, rules=RULES, batch_size=len(facts))
    embed = double.hf.get_input_embeddings()
    ends = [embed(tokens.ids).detach() for tokens in (batch.clean, batch.corrupt)]
    half = ((ends[0] + ends[1]) / 2).requires_grad_()
    start = {"record": places, "change_embedding": lambda _: half}
    with untouched(double), relevance_rules(double), hooked(double, **start) as seen:
        metric = batch.logit_diff(last_logits(double, batch.corrupt))
        gradients = torch.autograd.grad(metric.sum(), [seen[place] for place in places])
    for place, gradient in zip(places, gradients, strict=True):
        with untouched(double), torch.no_grad():
            moved = [run(double, batch, tokens, [place], gradient=False).activations[place]
                     for tokens in (batch.clean, batch.corrupt)]  # fmt: skip
        expected = ((moved[0] - moved[1]) * gradient).sum((1, 2))
        row = found.components.index(Component(*place))
        scores = found.per_fact[[facts.index(fact) for fact in of_pairs], row].sum(axis=1)
        np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-9, atol=1e-9)


def test_a_norm_that_is_none_is_refused(tiny_model, facts) -> None:
    class OddNorm(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.eps = weight, 1e-6

        def forward(self, x):
            return self.weight * x / x.abs().amax(-1, keepdim=True)

    model = tiny_model("llama")
    model.hf.model.norm = OddNorm(model.hf.model.norm.weight)
    batch = a_batch(model, facts)
    with pytest.raises(NotSupported, match="OddNorm"), untouched(model), relevance_rules(model):
        last_logits(model, batch.clean)
    assert not model.hf.model.norm._forward_hooks


@pytest.mark.parametrize("path", ["model.layers.1.post_attention_layernorm", "model.norm"])
def test_a_norm_by_another_name_is_refused_and_not_passed_over(tiny_model, path) -> None:
    class Scaled(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm.forward

        def forward(self, x):
            return self.norm(x)

    model = tiny_model("llama")
    model.hf.set_submodule(path, Scaled(model.hf.get_submodule(path)))
    with pytest.raises(NotSupported, match=f"{path} is a Scaled") as error, relevance_rules(model):
        pass
    assert "\n" not in str(error.value)
    with relevance_rules(model, ("activations",)):
        pass
    assert not any(module._forward_hooks for module in model.hf.modules())


def test_the_norms_of_every_architecture_are_known(any_model: Model) -> None:
    blocks = 4 if any_model.architecture.name in ("gemma2", "gemma3_text") else 2
    assert len(stream_norms(any_model)) == blocks * any_model.n_layers + 1
    assert all("Norm" in type(module).__name__ for module in stream_norms(any_model).values())


# --- AtP* ---


def test_recorded_attention_computes_the_same(any_model: Model, facts) -> None:
    batch = a_batch(any_model, facts)
    own = any_model.hf.config._attn_implementation
    with untouched(any_model), torch.no_grad():
        before = last_logits(any_model, batch.clean)
        with recorded_attention(any_model) as record:
            after = last_logits(any_model, batch.clean)
            if any_model.architecture.name == "gpt_neo":
                with pytest.raises(NotSupported, match="cannot be watched"):
                    record.take()
            else:
                found = record.take()
                shapes = {tuple(a.pattern.shape) for a in found.values()}
                n, width = batch.clean.ids.shape
                assert shapes == {(n, any_model.n_heads, width, width)}
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert any_model.hf.config._attn_implementation == own


def test_head_effects_equal_replacing_one_query_key_or_value_at_a_time(double, facts) -> None:
    batch = a_batch(double, facts, same_length=True)
    n, width = batch.clean.ids.shape
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, d = 2, 3
    mask = torch.full((width, width), float("-inf"), dtype=torch.float64).triu(1)[None, None]

    def attended(softcap, size):
        one = Attended(queries=size * draw(n, heads, width, d), keys=size * draw(n, heads, width, d),
                       values=draw(n, heads, width, d), pattern=draw(1), mask=mask, scaling=0.7,
                       softcap=softcap)  # fmt: skip
        pattern = (one.logits(one.queries, one.keys) + mask).softmax(-1)
        return Attended(**{**one.__dict__, "pattern": pattern})

    for softcap, size in ((None, 1), (1.5, 1), (None, 30)):  # at 30 one key has all the attention, to the last bit
        clean, corrupt = attended(softcap, size), attended(softcap, size)
        of_pattern, of_values = draw(n, heads, width, width), draw(n, heads, width, d)
        found = head_effects(batch, clean, corrupt, of_pattern, of_values)
        expected = torch.zeros_like(found)
        for b, pair in enumerate(batch.pairs):
            for c, k, role in pair.aligned:
                q, key = corrupt.queries[b].clone(), corrupt.keys[b].clone()
                q[:, k] = clean.queries[b][:, c]
                key[:, k] = clean.keys[b][:, c]
                for queries, keys in ((q, corrupt.keys[b]), (corrupt.queries[b], key)):
                    pattern = (corrupt.logits(queries, keys) + mask[0]).softmax(-1)
                    expected[b, :, role] += ((pattern - corrupt.pattern[b]) * of_pattern[b]).sum((-2, -1))
                expected[b, :, role] += ((clean.values[b] - corrupt.values[b])[:, k] * of_values[b][:, k]).sum(-1)
        torch.testing.assert_close(found, expected)


def test_an_attention_sublayer_is_the_sum_of_its_repaired_heads(double, facts) -> None:
    batch, heads = a_batch(double, facts), all_components(double, ("head",))
    sublayers = all_components(double, ("attention",))
    with untouched(double):
        of_heads, *_ = atp_star_scores(double, batch, heads, True, False)
        found, *_ = atp_star_scores(double, batch, sublayers, True, False)
        plain, *_ = atp_star_scores(double, batch, sublayers, False, False)
    summed = of_heads.unflatten(1, (double.n_layers, double.n_heads)).sum(2)
    torch.testing.assert_close(found, summed)
    assert not torch.allclose(found, plain)


def test_dropped_gradients_equal_stopping_them_by_hand(double, facts) -> None:
    batch, components = a_batch(double, facts), all_components(double, ("mlp", "attention", "neuron"))
    n = double.n_layers
    with untouched(double):
        found, *_ = atp_star_scores(double, batch, components, False, True)
        expected = torch.zeros_like(found)
        clean = run(double, batch, batch.clean, [(c.kind, c.layer) for c in components], gradient=False)
        for layer in range(n):
            stop = {(kind, layer): (lambda v: v.detach()) for kind in ("mlp", "attention")}
            places = [(c.kind, c.layer) for c in components if c.layer != layer]
            places = list(dict.fromkeys(places))
            with (
                torch.enable_grad(),
                hooked(
                    double, record=places, change=stop, change_embedding=lambda e: e.detach().requires_grad_()
                ) as seen,
            ):
                metric = batch.logit_diff(last_logits(double, batch.corrupt))
            gradients = dict(zip(places, torch.autograd.grad(metric.sum(), [seen[p] for p in places]), strict=True))
            for row, c in enumerate(components):
                place = (c.kind, c.layer)
                if place in gradients:
                    moved = difference(batch, clean.activations[place], seen[place].detach())
                    product = moved * batch.take(gradients[place], batch.corrupt_positions)
                    expected[:, row] += by_role(double, batch, place, product)[:, c.index or 0].abs() / (n - 1)
    torch.testing.assert_close(found, expected)


def test_without_repairs_atp_star_is_attribution_patching(double, facts) -> None:
    batch, components = a_batch(double, facts), all_components(double, KINDS)
    with untouched(double):
        found, *_ = atp_star_scores(double, batch, components, False, False)
        expected, *_ = first_order_scores(double, batch, components, "denoise")
    torch.testing.assert_close(found, expected)
