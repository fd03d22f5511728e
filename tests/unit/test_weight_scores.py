"""Gradient norm, Fisher, SNIP and the contrast: equal to a loop over facts, parts that add up, laws of the contrast."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn.components import Component
from mechunlearn.facts import Fact
from mechunlearn.localize.fisher import fisher
from mechunlearn.localize.forget_retain_contrast import forget_retain_contrast
from mechunlearn.localize.gradient_norm import gradient_norm
from mechunlearn.localize.pairs import build_pairs
from mechunlearn.localize.snip import snip
from mechunlearn.models import Model, component_parameters
from mechunlearn.prompts import encode, encode_answers, render

KINDS = ("mlp", "attention", "head", "neuron")


@pytest.fixture(scope="module")
def facts(tiny_facts) -> tuple[Fact, ...]:
    colours = tiny_facts.of("colour").facts[:5]
    # one answer of several tokens, so that the sum over its tokens is tested
    long = replace(colours[0], target_true="red city born", choices=("red city born", "green"))
    return (long, *colours[1:])


def log_prob(model: Model, fact: Fact) -> torch.Tensor:
    prompt = encode(model, [render(fact, "prompt")])[0]
    answer = encode_answers(model, [fact.target_true])[fact.target_true]
    logits = model.hf(torch.tensor([[*prompt, *answer]])).logits[0]
    return sum(logits[len(prompt) + i - 1].log_softmax(-1)[token] for i, token in enumerate(answer))  # type: ignore[return-value]


def logit_diff(model: Model, facts, index: int) -> torch.Tensor:
    pair = build_pairs(model, facts)[index]
    logits = model.hf(torch.tensor([pair.clean])).logits[0, -1]
    return logits[pair.answer] - logits[pair.counterfactual]


def by_loop(model: Model, metric: torch.Tensor, components, entry) -> list[float]:
    """The literal version: the whole gradient of one fact, and each component's entries of it."""
    parameters = dict(model.hf.named_parameters())
    found = torch.autograd.grad(metric, list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, found, strict=True))

    def total(component) -> float:
        masks = component_parameters(model, component)
        return sum(
            float((entry(parameters[n], gradients[n]) * m.expand(parameters[n].shape)).sum()) for n, m in masks.items()
        )

    return [total(component) for component in components]


def test_scores_equal_a_loop_over_facts_and_gradients(any_model: Model, facts) -> None:
    any_model.hf.double()
    rtol = 1e-5 if any_model.architecture.name == "gpt_neo" else 1e-8  # its attention is in float32 whatever the dtype
    options = {"kinds": KINDS, "normalize": "sum", "batch_size": 3}
    squared = fisher(any_model, facts, **options)
    saliency = snip(any_model, facts, metric="log_prob", **options)
    absolute = gradient_norm(any_model, facts, norm="l1", metric="log_prob", **options)
    norm = gradient_norm(any_model, facts, metric="log_prob", **options)
    for i, fact in enumerate(facts[:2]):
        for scores, entry in (
            (squared, lambda w, g: g**2), (saliency, lambda w, g: (w * g).abs()), (absolute, lambda w, g: g.abs()),
        ):  # fmt: skip
            expected = by_loop(any_model, log_prob(any_model, fact), scores.components, entry)
            np.testing.assert_allclose(scores.per_fact[i, :, 0], expected, rtol=rtol, atol=1e-18)
    np.testing.assert_allclose(norm.per_fact**2, squared.per_fact, rtol=1e-9)


def test_the_logit_difference_is_differentiated_too_and_means_divide_by_the_number_of_weights(tiny_model, facts):
    model = tiny_model("gpt2")
    model.hf.double()
    scores = fisher(model, facts, metric="logit_diff", kinds=("mlp", "head"), normalize="mean")
    summed = by_loop(model, logit_diff(model, facts, 3), scores.components, lambda w, g: g**2)
    shapes = {name: p.shape for name, p in model.hf.named_parameters()}
    sizes = [
        sum(int(m.expand(shapes[n]).sum()) for n, m in component_parameters(model, c).items())
        for c in scores.components
    ]
    np.testing.assert_allclose(scores.per_fact[3, :, 0], np.array(summed) / sizes, rtol=1e-8)


def test_parts_sum_to_their_wholes(tiny_model, facts) -> None:
    """No biases, and one key and value head per head: nothing is shared and nothing belongs to the sublayer alone."""
    model = tiny_model("llama")
    model.hf.double()
    for method in (fisher, snip):
        scores = method(model, facts, kinds=("mlp", "neuron"), normalize="sum")
        for layer in range(model.n_layers):
            whole = scores.values[scores.components.index(Component("mlp", layer))]
            neurons = [v for v, c in zip(scores.values, scores.components, strict=True)
                       if c.kind == "neuron" and c.layer == layer]  # fmt: skip
            assert len(neurons) == model.d_mlp
            assert sum(neurons) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("method", [fisher, gradient_norm, snip], ids=lambda m: m.__name__)
def test_batches_and_padding_change_nothing(method, tiny_model, facts) -> None:
    model = tiny_model("gpt_neox")
    model.hf.double()
    alone = np.concatenate([method(model, [fact], metric="log_prob").per_fact for fact in facts])
    np.testing.assert_allclose(method(model, facts, metric="log_prob").per_fact, alone, rtol=1e-10)


def test_nothing_to_contrast_with_itself(tiny_model, facts) -> None:
    model = tiny_model()
    for contrast, value in (("share", 0.0), ("log", 0.0), ("ratio", 1.0)):
        scores = forget_retain_contrast(model, facts[1:2], retain=facts[1:2], contrast=contrast)
        np.testing.assert_allclose(scores.per_fact, value, atol=1e-6)


def test_contrasts_are_what_they_say(tiny_model, facts, tiny_facts) -> None:
    model, retain = tiny_model(), tiny_facts.of("city").facts[:6]
    given = {"metric": "logit_diff"}
    f, r = fisher(model, facts, **given).per_fact, fisher(model, sorted(retain, key=lambda x: x.key), **given).values
    share, log, ratio = (
        forget_retain_contrast(model, facts, retain=retain, contrast=c).per_fact for c in ("share", "log", "ratio")
    )
    np.testing.assert_allclose(share[..., 0], f[..., 0] / f.sum(1) - r / r.sum(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(share.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(log[..., 0], np.log(f[..., 0] / r), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ratio, np.exp(log), rtol=1e-6)


def test_a_contrast_needs_facts_to_keep(tiny_model, facts) -> None:
    for retain in (None, ()):
        with pytest.raises(ValueError, match="give `retain`") as error:
            forget_retain_contrast(tiny_model(), facts, retain=retain)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="kinds"):
        snip(tiny_model(), facts, kinds=())
