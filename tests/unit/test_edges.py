"""Edges: they sum to nodes, and each is the derivative along its own path."""

import pytest
import torch

from mechunlearn.activations import last_logits, untouched
from mechunlearn.components import Component
from mechunlearn.localize.edges import _heads, edge_attribution_patching, edge_scores
from mechunlearn.localize.first_order import by_role, difference, first_order_scores, run
from mechunlearn.localize.pairs import build_pairs, to_batch
from mechunlearn.models import Model, NotSupported, all_components, block


def test_a_writers_edges_sum_to_its_own_score(any_model: Model, tiny_facts) -> None:
    any_model.hf.double()
    batch = to_batch(any_model, build_pairs(any_model, tiny_facts.facts[:6]))
    if any_model.architecture.attention_write != any_model.architecture.attention:
        with pytest.raises(NotSupported, match="heads do not add up"):
            edge_attribution_patching(any_model, tiny_facts.facts[:2])
        return
    components = all_components(any_model, ("head", "mlp"))
    with untouched(any_model):
        edges = edge_scores(any_model, batch).sum(2)
        nodes, *_ = first_order_scores(any_model, batch, components, "denoise")
        start = ("stream", 0)
        clean = run(any_model, batch, batch.clean, [start], gradient=False).activations[start]
        corrupt = run(any_model, batch, batch.corrupt, [start], gradient=True)
        gradient = batch.take(corrupt.gradients[start], batch.corrupt_positions)
        moved = difference(batch, clean, corrupt.activations[start])
        embed = by_role(any_model, batch, start, moved * gradient).sum(2)
    torch.testing.assert_close(edges, torch.cat([embed, nodes.sum(2)], dim=1))


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
