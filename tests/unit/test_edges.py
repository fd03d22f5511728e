"""Edges: they sum to nodes, and each is the derivative along its own path."""

import numpy as np
import pytest
import torch

from mechunlearn.activations import last_logits, untouched
from mechunlearn.components import Component
from mechunlearn.localize.backward_rules import RULES, relevance_rules
from mechunlearn.localize.edges import _heads, edge_attribution_patching, edge_scores
from mechunlearn.localize.first_order import by_role, difference, first_order_scores, run
from mechunlearn.localize.integrated_gradients import integrated_gradients, over_inputs
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.localize.relevance_patching import relevance_patching
from mechunlearn.models import Model, NotSupported, all_components, block


@pytest.mark.parametrize(("steps", "rules"), [(0, ()), (3, ()), (0, RULES), (2, ("norms",))])
def test_a_writers_edges_sum_to_its_own_score(any_model: Model, tiny_facts, steps, rules) -> None:
    """By attribution patching, integrated gradients over inputs or relevance patching."""
    any_model.hf.double()
    batch = to_batch(any_model, build_pairs(any_model, tiny_facts.facts[:6]))
    if any_model.architecture.attention_write != any_model.architecture.attention:
        with pytest.raises(NotSupported, match="heads do not add up"):
            edge_attribution_patching(any_model, tiny_facts.facts[:2])
        return
    components = all_components(any_model, ("head", "mlp"))
    with untouched(any_model), relevance_rules(any_model, rules):
        edges = edge_scores(any_model, batch, steps).sum(2)
        nodes, *_ = (
            over_inputs(any_model, batch, components, steps)
            if steps
            else first_order_scores(any_model, batch, components, "denoise")
        )
        torch.testing.assert_close(edges[:, 1:], nodes.sum(2))
        if steps:
            return
        start = ("stream", 0)
        clean = run(any_model, batch, batch.clean, [start], gradient=False).activations[start]
        corrupt = run(any_model, batch, batch.corrupt, [start], gradient=True)
        gradient = batch.take(corrupt.gradients[start], batch.corrupt_positions)
        moved = difference(batch, clean, corrupt.activations[start])
        embed = by_role(any_model, batch, start, moved * gradient).sum(2)
    torch.testing.assert_close(edges[:, :1], embed)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_edges_of_a_writer_are_its_score_by_the_localizer_of_these_options(
    tiny_model, tiny_facts, architecture
) -> None:
    model, facts, kinds = tiny_model(architecture), tiny_facts.facts[:6], ("head", "mlp")
    model.hf.double()
    for given, localizer in (
        ({"steps": 3}, integrated_gradients), ({"steps": 2, "rules": RULES}, integrated_gradients),
        ({"rules": RULES}, relevance_patching),
    ):  # fmt: skip
        edges = edge_attribution_patching(model, facts, **given)
        nodes = localizer(model, facts, kinds=kinds, **given)
        assert edges.writers[1:] == tuple(map(str, nodes.components))
        np.testing.assert_allclose(edges.per_fact.sum(2)[:, 1:], nodes.per_fact.sum(2), rtol=1e-4, atol=1e-6)
        assert edges.options.items() >= {name: list(v) if name == "rules" else v for name, v in given.items()}.items()
    with pytest.raises(ValueError, match="got -1, allowed: 0 and up"):
        edge_attribution_patching(model, facts, steps=-1)


def test_an_edge_is_what_a_small_step_of_the_writer_changes_through_that_reader_alone(tiny_model, tiny_facts) -> None:
    model = tiny_model("llama")
    model.hf.double()
    pairs = [p for p in build_pairs(model, tiny_facts.facts[:8]) if len(p.clean) == len(p.corrupt)]
    batch = to_batch(model, [p for p in pairs if len(p.clean) == len(pairs[0].clean)])
    layer, head = 2, 3
    size = 1e-3  # the norm computes in float32
    with untouched(model):
        scores = edge_scores(model, batch)
        names = edge_attribution_patching(model, tiny_facts.facts[:1])
        clean = run(model, batch, batch.clean, [("head", 0)], gradient=False).activations["head", 0]
        corrupt = run(model, batch, batch.corrupt, [("head", 0)], gradient=False)
        moved = _heads(model, 0, difference(batch, clean, corrupt.activations["head", 0]))[
            :, :, 1
        ]  # a0.h1, aligned = all

        def through(module, hook):
            """Central difference of the metric when the hook sees the writer's output a step further, or back."""
            found = []
            for step in (size, -size):
                handle = module.register_forward_hook(lambda m, i, o, step=step: hook(m, i, o, step))
                found.append(batch.logit_diff(last_logits(model, batch.corrupt)))
                handle.remove()
            return (found[0] - found[1]) / (2 * size)

        def shifted_mlp(module, inputs, _output, step):
            return module.forward(inputs[0] + step * moved)

        norm, attention = block(model, layer).input_layernorm, block(model, layer).self_attn
        seen = []
        handle = norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))

        def shifted_query(module, _inputs, output, step):
            changed = module.forward(norm.forward(seen[-1] + step * moved))
            columns = slice(head * model.d_head, (head + 1) * model.d_head)
            output = output.clone()
            output[..., columns] = changed[..., columns]
            return output

        with torch.no_grad():
            found = {
                f"m{layer}": through(block(model, layer).post_attention_layernorm, shifted_mlp),
                f"a{layer}.h{head}.q": through(attention.q_proj, shifted_query),
            }
        handle.remove()
    writer = names.writers.index("a0.h1")
    for reader, expected in found.items():
        score = scores[:, writer, names.readers.index(reader)]
        torch.testing.assert_close(score, expected, atol=3e-4, rtol=1e-2)
    assert (scores[:, names.writers.index("m2"), : names.readers.index("m2") + 1] == 0).all()


def test_the_strongest_edges_come_first_and_shared_keys_are_named_by_group(tiny_model, tiny_facts) -> None:
    scores = edge_attribution_patching(tiny_model("llama"), tiny_facts.facts[:6])
    frame = scores.to_frame()
    assert frame["value"].abs().is_monotonic_decreasing
    assert {"a1.g0.k", "a1.g1.v", "a1.h3.q", "m2", "logits"} <= set(scores.readers)
    assert "a1.h0.k" in edge_attribution_patching(tiny_model("gpt2"), tiny_facts.facts[:2]).readers
    assert Component.parse(scores.writers[1]).kind == "head"
