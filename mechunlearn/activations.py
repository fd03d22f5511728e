"""Forward passes that read or replace activations, and leave the model as it was.

A *place* is what the residual stream is made of: ("mlp", 3) and ("attention", 3) are the writes of layer 3,
("head", 3) all its heads' outputs before the output projection, ("neuron", 3) its MLP's neurons, ("mid", 3) the stream
between the two, ("block", 3) the stream after block 3 and ("stream", 0) the stream before the first block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechunlearn.components import Component
from mechunlearn.models import (
    Model,
    NotSupported,
    attention,
    attention_write,
    block,
    embedding,
    first_output,
    has_parallel_blocks,
    head_input,
    mlp_neurons,
    mlp_write,
    with_first_output,
)

PlaceKind = Literal["mlp", "attention", "head", "neuron", "mid", "block", "stream"]
Place = tuple[PlaceKind, int]
Change = Callable[[Tensor], Tensor]


def place_of(component: Component) -> Place:
    """Where a component's values are seen; a head's or neuron's are columns of its layer's."""
    return component.kind, component.layer


def by_place(components: Sequence[Component]) -> dict[Place, list[int]]:
    """Which of the components, by number, are seen at each place."""
    found: dict[Place, list[int]] = {}
    for number, component in enumerate(components):
        found.setdefault(place_of(component), []).append(number)
    return found


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token sequences padded on the right: under a causal mask, padding there changes nothing before it."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    last: Int[Tensor, " batch"]
    """Position of the last real token."""


def pad(model: Model, sequences: Sequence[Sequence[int]]) -> Tokens:
    """Put sequences of different lengths into one batch on the model's device."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=model.device)
    if not sequences or int(lengths.min()) < 1:
        raise ValueError("batch: got an empty token sequence or none at all, allowed: at least one token each")
    width = int(lengths.max())
    padded = [[*sequence, *[sequence[-1]] * (width - len(sequence))] for sequence in sequences]
    ids = torch.tensor(padded, device=model.device)
    return Tokens(ids=ids, mask=torch.arange(width, device=model.device) < lengths[:, None], last=lengths - 1)


@contextmanager
def untouched(model: Model) -> Iterator[None]:
    """Inside: eval mode and no parameter requires grad. Afterwards, also on errors, every flag is what it was.

    With frozen parameters a backward pass computes activation gradients only, at about half the cost.
    """
    modes = [(module, module.training) for module in model.hf.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.hf.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def hooked(
    model: Model,
    *,
    record: Sequence[Place] = (),
    change: Mapping[Place, Change] | None = None,
    change_embedding: Change | None = None,
) -> Iterator[dict[Place, Tensor]]:
    """Inside, forward passes fill the yielded mapping with the (changed) activations of the recorded places."""
    seen: dict[Place, Tensor] = {}
    change = change or {}

    def visit(place: Place, value: Tensor) -> Tensor:
        value = change[place](value) if place in change else value
        if place in record:
            seen[place] = value
        return value

    with ExitStack() as handles:
        if change_embedding is not None:
            alter = change_embedding

            def on_embedding(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                return alter(output)

            handle = embedding(model).register_forward_hook(on_embedding)
            handles.callback(handle.remove)
        for place in dict.fromkeys((*record, *change)):
            for handle in _attach(model, place, visit):
                handles.callback(handle.remove)
        yield seen


def _attach(model: Model, place: Place, visit: Callable[[Place, Tensor], Tensor]) -> Sequence[Any]:
    kind, layer = place
    if kind == "mid":
        return attach_between(model, layer, visit)

    def on_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return with_first_output(output, visit(place, first_output(output)))

    def on_input(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            return (visit(place, inputs[0]), *inputs[1:]), named
        return inputs, {**named, "hidden_states": visit(place, named["hidden_states"])}

    readers = {"head": head_input, "neuron": mlp_neurons, "stream": block}
    if kind in readers:
        return [readers[kind](model, layer).register_forward_pre_hook(on_input, with_kwargs=True)]
    modules = {"mlp": mlp_write, "attention": attention_write, "block": block}
    return [modules[kind](model, layer).register_forward_hook(on_output)]


def attach_between(model: Model, layer: int, visit: Callable[[Place, Tensor], Tensor]) -> Sequence[Any]:
    """Visit the stream between attention and MLP; what comes back is all that the MLP and later blocks see of it.

    It takes the place of the stream in the very tensor that the block keeps for the residual sum: nothing of the old
    stream passes, not even by rounding, and hooks on the sublayers see and change what they would without.
    """
    if has_parallel_blocks(model):
        raise NotSupported(f"{model.name}: its blocks are parallel, so there is no stream between attention and MLP")

    def on_norm(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        inputs[0].copy_(visit(("mid", layer), inputs[0].clone()))  # a copy: backward passes need what was read

    return [block(model, layer).get_submodule(model.architecture.mlp_norm).register_forward_pre_hook(on_norm)]


@contextmanager
def instead(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, these modules run this for `forward`, between their hooks; afterwards, also on errors, their own."""
    with ExitStack() as restored:
        for module in modules:
            own = module.__dict__.get("forward")  # accelerate puts one here
            restored.callback(_restore_forward, module, own)
            module.forward = forward
        yield


def _restore_forward(module: nn.Module, own: Any) -> None:
    module.__dict__.pop("forward", None)
    if own is not None:
        module.forward = own


class _Read(Exception):
    """Raised where a forward pass has come far enough."""


@torch.no_grad()
def read(
    model: Model, ids: Int[Tensor, "batch pos"], place: Place, attention_mask: Int[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch pos d"]:
    """One place's activations; what comes after it is not computed."""
    found: list[Tensor] = []

    def stop(value: Tensor) -> Tensor:
        found.append(value)
        raise _Read

    with untouched(model), hooked(model, change={place: stop}), suppress(_Read):
        model.hf.base_model(ids, attention_mask=attention_mask, use_cache=False)
    return found[0]


def stream_places(model: Model, *, mid: bool = False) -> tuple[Place, ...]:
    """The places that `streams` needs recorded."""
    kinds: tuple[PlaceKind, ...] = ("attention", "block") if mid else ("block",)
    return ("stream", 0), *((kind, layer) for layer in range(model.n_layers) for kind in kinds)


def streams(
    model: Model, seen: Mapping[Place, Float[Tensor, "batch pos d_model"]], *, mid: bool = False
) -> Iterator[Float[Tensor, "batch pos d_model"]]:
    """The residual stream before the first block, then after each (with `mid`: after each of its two sublayers).

    Raises:
        NotSupported: `mid`, where attention and MLP of a block read the same stream: there is none between them.
    """
    if mid and has_parallel_blocks(model):
        raise NotSupported(
            f"{model.name}: its blocks are parallel, so no stream is between attention and MLP; use blocks"
        )
    stream = seen["stream", 0]
    yield stream
    for layer in range(model.n_layers):
        if mid:
            yield stream + seen["attention", layer]
        stream = seen["block", layer]
        yield stream


@contextmanager
def blocked_attention(model: Model, layers: Sequence[int], blocked: Bool[Tensor, "batch query key"]) -> Iterator[None]:
    """Inside, the given layers' attention cannot look where `blocked` is true; the rest is attended to as if alone.

    A query must be left with a key of its own past. For one batch of forward passes.

    Source: Geva et al. 2023, arXiv:2304.14767, section 4 ("attention knockout").
    """

    def hide(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        mask = named.get("attention_mask")
        lowest = torch.finfo(model.dtype).min
        if mask is None:
            causal = torch.ones_like(blocked).tril()
            mask = torch.zeros(causal.shape, dtype=model.dtype, device=model.device).masked_fill_(~causal, lowest)
            mask = mask[:, None]
        hidden = blocked[:, None]
        mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, lowest)
        return inputs, {**named, "attention_mask": mask}

    with ExitStack() as handles:
        for layer in layers:
            handle = attention(model, layer).register_forward_pre_hook(hide, with_kwargs=True)
            handles.callback(handle.remove)
        yield


def last_logits(model: Model, tokens: Tokens) -> Float[Tensor, "batch d_vocab"]:
    """Logits after the last real token of every sequence, in float32 or better; no other position is unembedded."""
    keep, place = torch.unique(tokens.last, return_inverse=True)
    mask = None if bool(tokens.mask.all()) else tokens.mask.long()
    output = model.hf(input_ids=tokens.ids, attention_mask=mask, use_cache=False, logits_to_keep=keep)
    return exact(output.logits[torch.arange(len(place), device=place.device), place])


def leaf(output: Tensor) -> Tensor:
    """A `change_embedding` that starts the graph at the embeddings: it then holds activations and no parameters."""
    return output.detach().requires_grad_()


def exact(value: Tensor) -> Tensor:
    """The tensor in float32, or as it is if that is better: products in half precision would change scores."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
