"""Paths: what senders do to the facts through chosen receivers alone, with everything else frozen.

Between senders and receivers nothing is recomputed, so a receiver's input differs by exactly what the senders write
differently; from the receivers on the model runs freely. For one batch of pairs, inside `untouched`, without gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechunlearn.activations import Change, Place, hooked, place_of
from mechunlearn.components import Component
from mechunlearn.localize.patching import Exchange, Measure, head_columns, written
from mechunlearn.localize.restart import read_out, restart, skipped
from mechunlearn.models import Model, projection, projection_columns

Changed = Bool[Tensor, "batch pos"]
Write = Float[Tensor, "batch pos d_model"]
Part = Literal["query", "key", "value"]


@dataclass(frozen=True, kw_only=True, order=True)
class Receiver:
    """An input that paths end in: of the unembedding ("final"), of an MLP, or of a head's queries, keys or values."""

    part: Literal["final", "mlp", "query", "key", "value"]
    layer: int = -1
    head: int = -1
    """A query head; for keys and values a key-value head, with which all query heads that share it receive."""


FINAL = Receiver(part="final")


def total_effect(
    model: Model, given: Exchange, senders: Sequence[Component], changed: Changed, measure: Measure
) -> Float[Tensor, " batch"]:
    """What changes when the senders' values are put in at the changed tokens and all that follows is run."""
    change = {place: _swap(mask, given.values[place]) for place, mask in _masks(model, senders, changed).items()}
    start = min(layer for _, layer in change)
    rows = torch.arange(len(changed), device=changed.device)
    after = restart(model, given.run, rows, start, given.run.stream(start), change=change)
    return given.sign * (measure(after, rows) - measure(given.run.logits, rows))


def path_effect(
    model: Model,
    given: Exchange,
    senders: Sequence[Component],
    receivers: Sequence[Receiver],
    changed: Changed,
    measure: Measure,
) -> Float[Tensor, " batch"]:
    """What changes when the senders' values at the changed tokens reach the receivers' inputs and nothing else.

    Receivers do not feed each other: each gets the run's own input plus what the senders before it write.
    """
    run, rows = given.run, torch.arange(len(changed), device=changed.device)
    writes = sender_writes(model, given, senders, changed)
    added = torch.stack(list(writes.values())).sum(dim=0)
    inner = [receiver for receiver in receivers if receiver != FINAL]
    if inner:
        received = _received(model, given, inner, writes)
        change: dict[Place, Change] = {
            ("mlp", r.layer): _swap(changed[..., None], received[r]) for r in inner if r.part == "mlp"
        }
        if FINAL in receivers:
            change["block", model.n_layers - 1] = lambda own: own + added
        start = min(receiver.layer for receiver in inner)
        with _heads_receive(model, {r: v for r, v in received.items() if r.part != "mlp"}, changed):
            logits = restart(model, run, rows, start, run.stream(start), change=change)
    else:
        logits = read_out(model, run, (run.stream(model.n_layers) + added)[rows, run.tokens.last])
    return given.sign * (measure(logits, rows) - measure(run.logits, rows))


def direct_effects(
    model: Model, given: Exchange, components: Sequence[Component], changed: Changed, measure: Measure
) -> Float[Tensor, "component batch"]:
    """`path_effect` of one component after the other on the final residual stream.

    Only the last token is looked at, for what is written elsewhere cannot reach the logits directly.
    """
    run, last = given.run, given.run.tokens.last
    rows = torch.arange(len(last), device=last.device)
    final, before = run.stream(model.n_layers)[rows, last], measure(run.logits, rows)
    effects: list[Tensor] = []
    for component in components:
        place = place_of(component)
        own = run.activations[place][rows, last]
        mask = changed[rows, last][:, None]
        mask = mask & head_columns(model, [component.index]) if component.kind == "head" else mask
        write = written(model, place, torch.where(mask, given.values[place][rows, last], own), own)
        effects.append(measure(read_out(model, run, final + write), rows) - before)
    return given.sign * torch.stack(effects)


def sender_writes(model: Model, given: Exchange, senders: Sequence[Component], changed: Changed) -> dict[Place, Write]:
    """How much more each sublayer with a sender writes into the stream, all else being as it is.

    Raises:
        ValueError: an attention sublayer and one of its own heads.
    """
    writes: dict[Place, Write] = {}
    for place, mask in _masks(model, senders, changed).items():
        own, sublayer = given.run.activations[place], _sublayer(place)
        if sublayer in writes:
            raise ValueError(f"path patching: got attention {place[1]} and heads of it as senders, allowed: either")
        writes[sublayer] = written(model, place, torch.where(mask, given.values[place], own), own)
    return writes


def _masks(
    model: Model, senders: Sequence[Component], changed: Changed
) -> dict[Place, Bool[Tensor, "batch pos width"]]:
    """What the senders change at each place; the width is 1 where it is all columns."""
    masks: dict[Place, Bool[Tensor, "batch pos width"]] = {}
    for place in dict.fromkeys(place_of(sender) for sender in senders):
        heads = [sender.index for sender in senders if place_of(sender) == place]
        masks[place] = changed[..., None]
        if place[0] == "head":
            masks[place] = masks[place] & head_columns(model, heads).any(dim=0)
    return masks


def _sublayer(place: Place) -> Place:
    return ("attention" if place[0] == "head" else place[0]), place[1]


def _received(
    model: Model, given: Exchange, receivers: Sequence[Receiver], writes: Mapping[Place, Write]
) -> dict[Receiver, Tensor]:
    """What the receivers make of their changed inputs: a head's [batch pos d_head], an MLP's write [batch pos d_model].

    One pass in which the receivers' blocks alone are run, each on the run's own stream plus the senders' writes.
    """
    run, layers = given.run, sorted({receiver.layer for receiver in receivers})
    zero = torch.zeros_like(run.stream(0))
    change: dict[Place, Change] = {}
    for layer in layers:
        change["stream", layer] = _constant(
            run.stream(layer) + sum((w for (_, n), w in writes.items() if n < layer), zero)
        )
        if Receiver(part="mlp", layer=layer) in receivers:  # attention below an MLP is frozen, too, or a sender
            frozen = run.activations["attention", layer] + writes.get(("attention", layer), zero)
            change["attention", layer] = _constant(frozen)
    seen: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, part: str) -> Any:
        def on_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen[layer, part] = output

        return on_output

    with ExitStack() as stack:
        others = [layer for layer in range(model.n_layers) if layer not in layers]
        stack.enter_context(skipped(model, run, others, zero))
        mlps = stack.enter_context(hooked(model, record=[("mlp", layer) for layer in layers]))
        for layer, part in dict.fromkeys((r.layer, r.part) for r in receivers if r.part != "mlp"):
            module = projection(model, layer, cast(Part, part))
            stack.callback(module.register_forward_hook(keep(layer, part)).remove)
        restart(model, run, torch.arange(len(zero), device=zero.device), 0, run.stream(0), change=change)
    return {
        r: mlps["mlp", r.layer] if r.part == "mlp" else seen[r.layer, r.part][..., _columns(model, r)]
        for r in receivers
    }


@contextmanager
def _heads_receive(model: Model, received: Mapping[Receiver, Tensor], changed: Changed) -> Iterator[None]:
    """Inside, these heads' queries, keys or values are the given ones at the changed tokens."""

    def replace(receiver: Receiver, value: Tensor) -> Any:
        def on_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            output, columns = output.clone(), _columns(model, receiver)
            output[..., columns] = torch.where(changed[..., None], value, output[..., columns])
            return output

        return on_output

    with ExitStack() as stack:
        for receiver, value in received.items():
            module = projection(model, receiver.layer, cast(Part, receiver.part))
            stack.callback(module.register_forward_hook(replace(receiver, value)).remove)
        yield


def _columns(model: Model, receiver: Receiver) -> slice:
    return projection_columns(model, cast(Part, receiver.part), receiver.head)


def _swap(mask: Tensor, values: Tensor) -> Change:
    return lambda own: torch.where(mask, values, own)


def _constant(value: Tensor) -> Change:
    return lambda _: value
