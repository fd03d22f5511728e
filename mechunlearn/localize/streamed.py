"""First-order scores with one block's graph in memory at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechunlearn.activations import Place, Tokens, exact, hooked, last_logits
from mechunlearn.components import Component
from mechunlearn.localize.first_order import BatchScores, Form, assemble, by_role, difference, places_of
from mechunlearn.localize.pairs import PairBatch
from mechunlearn.models import Model, block, first_output, with_first_output


def streamed_scores(model: Model, batch: PairBatch, components: Sequence[Component], form: Form) -> BatchScores:
    """The same scores as `first_order_scores`, from block inputs alone; call inside `untouched`.

    Both runs are made once without a graph, keeping every block's input. Then, from the last block down, each block is
    run again with a graph, its part of the backward pass is done and its scores are taken. Peak memory beside the
    weights: 2 (n_layers + 1) [batch pos d_model] and one block's graph. Cost: five forward passes (seven for "both"),
    against three.
    """
    runs = [block_inputs(model, batch, batch.clean), block_inputs(model, batch, batch.corrupt)]
    wanted = (form != "denoise", form != "noise")
    gradients = [_at_the_end(model, batch, one) if needed else None for one, needed in zip(runs, wanted, strict=True)]
    positions = (batch.clean_positions, batch.corrupt_positions)
    places = places_of(components)
    effects: dict[Place, Tensor] = {}
    for layer in reversed(range(model.n_layers)):
        here = [place for place in places if place[1] == layer]
        values: dict[int, dict[Place, Tensor]] = {}
        total: dict[Place, Tensor] = {}
        for i in sorted((0, 1), key=lambda i: not wanted[i]):  # a graph is largest while least else is held
            values[i], found, gradients[i] = block_again(model, runs[i], layer, here, gradients[i])
            for place, gradient in found.items():
                part = exact(batch.take(gradient, positions[i])) / sum(wanted)
                total[place] = total[place] + part if place in total else part
            runs[i].calls.pop()
        for place in here:
            moved = difference(batch, values[0].pop(place), values[1].pop(place))
            effects[place] = by_role(model, batch, place, moved * total.pop(place))
    return assemble(components, effects), runs[0].metric, runs[1].metric


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRun:
    """A forward pass as the arguments of its blocks."""

    tokens: Tokens
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]
    last: list[Any]
    """What the last block returned; taken once."""
    metric: Tensor


def block_inputs(model: Model, batch: PairBatch, tokens: Tokens) -> BlockRun:
    """One forward pass without a graph, kept as what its blocks were called with."""
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    ends: list[Any] = []

    def note(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        hidden, rest = (inputs[0], inputs[1:]) if inputs else (named.pop("hidden_states"), ())
        calls.append((hidden, rest, named))

    with ExitStack() as stack, torch.no_grad():
        for layer in range(model.n_layers):
            stack.callback(block(model, layer).register_forward_pre_hook(note, with_kwargs=True).remove)
        last = block(model, model.n_layers - 1)
        stack.callback(last.register_forward_hook(lambda _module, _inputs, output: ends.append(output)).remove)
        metric = batch.logit_diff(last_logits(model, tokens))
    return BlockRun(tokens=tokens, calls=calls, last=ends, metric=metric)


def _at_the_end(model: Model, batch: PairBatch, one: BlockRun) -> Tensor:
    """Gradient of the metric by the last block's output; no block runs."""
    last = one.last.pop()
    end = first_output(last).detach().requires_grad_()
    with _blocks_skipped(model, with_first_output(last, end)), torch.enable_grad():
        metric = batch.logit_diff(last_logits(model, one.tokens))
    return torch.autograd.grad(metric.sum(), end)[0]


def block_again(
    model: Model, one: BlockRun, layer: int, places: Sequence[Place], gradient: Tensor | None
) -> tuple[dict[Place, Tensor], dict[Place, Tensor], Tensor | None]:
    """One block again: its activations, their gradients, and the gradient by its input; none where none came in."""
    hidden, rest, named = one.calls[layer]
    hidden = hidden.detach().requires_grad_(gradient is not None)
    with torch.set_grad_enabled(gradient is not None), hooked(model, record=places) as seen:
        output = first_output(block(model, layer)(hidden, *rest, **named))
    values = {place: value.detach() for place, value in seen.items()}
    if gradient is None:
        return values, {}, None
    found = torch.autograd.grad(output, [*(seen[place] for place in places), hidden], grad_outputs=gradient)
    return values, dict(zip(places, found[:-1], strict=True)), found[-1]


@contextmanager
def _blocks_skipped(model: Model, last: Any) -> Iterator[None]:
    """Inside, blocks hand on what they are given, and the last one returns `last`."""
    blocks = [block(model, layer) for layer in range(model.n_layers)]
    own = [module.__dict__.get("forward") for module in blocks]  # accelerate puts one there
    try:
        for module in blocks:
            module.forward = lambda hidden_states, *_args, **_named: hidden_states
        blocks[-1].forward = lambda *_args, **_named: last
        yield
    finally:
        for module, forward in zip(blocks, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
