"""Changed runs that restart in the middle: blocks below the change are not run, nor are tokens before it.

Nothing here knows an architecture. Skipped blocks get a `forward` that returns the kept residual stream, and tokens
before the change are handed to Hugging Face as keys and values of a longer text. The cache is a plain DynamicCache,
which keeps every token: sliding windows (Mistral, Gemma, GPT-Neo) are then masks over the whole text and stay right.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from mechunlearn.activations import Change, Place, Tokens, exact, hooked, instead
from mechunlearn.models import Model, attention, block, first_output, mlp, unembedding


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A forward pass of which enough is kept to restart it before any block and after any token."""

    tokens: Tokens
    logits: Float[Tensor, "batch d_vocab"]
    """After the last token, in float32 or better."""
    activations: Mapping[Place, Tensor]
    """What the places asked for hold, [batch pos width]; the stream before and after every block is among them."""
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    """Layer by layer, each [batch n_kv_heads pos d_head]."""
    wraps: bool
    """Whether the blocks return their stream in a tuple."""

    def stream(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before this block; for the number of layers, before the final norm."""
        return self.activations[("stream", 0) if layer == 0 else ("block", layer - 1)]


def record(model: Model, tokens: Tokens, places: Sequence[Place] = (), *, embed: Change | None = None) -> Run:
    """Run the tokens once and keep what a restart needs; call without gradients, inside `untouched`.

    Args:
        embed: changes the embeddings.
    """
    streams: tuple[Place, ...] = (("stream", 0), *(("block", layer) for layer in range(model.n_layers)))
    wraps: list[bool] = []
    cache = DynamicCache()

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        wraps.append(isinstance(output, tuple))

    handle = block(model, 0).register_forward_hook(note)
    try:
        with hooked(model, record=(*streams, *places), change_embedding=embed) as seen:
            logits = _last_logits(model, tokens.ids, tokens.last, cache)
    finally:
        handle.remove()
    pairs = tuple((layer.keys, layer.values) for layer in cast(list[Any], cache.layers))
    return Run(tokens=tokens, logits=logits, activations=seen, keys_values=pairs, wraps=wraps[0])  # pyright: ignore[reportArgumentType]


def restart(
    model: Model,
    run: Run,
    rows: Int[Tensor, " row"],
    layer: int,
    stream: Float[Tensor, "row pos d_model"],
    *,
    prefix: int = 0,
    change: Mapping[Place, Change] | None = None,
) -> Float[Tensor, "row d_vocab"]:
    """Logits after the last token of some of the run's rows, had the stream before block `layer` been this one.

    Args:
        stream: from token `prefix` on, as far as the longest of the rows; the tokens before are the run's own.
        change: further changes, in blocks from `layer` on; they see the tokens from `prefix` on. Without one in the
            last block, its MLP is run at the last token alone.
    """
    ids = run.tokens.ids[rows, prefix : prefix + stream.shape[1]]
    last, past = run.tokens.last[rows] - prefix, _past(run, rows, prefix, layer) if prefix else None
    entry: dict[Place, Change] = {("stream", 0): lambda _: stream} if layer == 0 else {}
    change = entry | dict(change or {})
    with skipped(model, run, range(layer), stream), ExitStack() as narrow:
        if all(at < model.n_layers - 1 for _, at in change):
            narrow.enter_context(_last_mlp_at(model, last, stream.shape[1]))
        with hooked(model, change=change):
            return _last_logits(model, ids, last, past)


def read_out(model: Model, run: Run, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Logits of streams before the final norm: no block is run."""
    ids = run.tokens.ids[:1, :1].expand(len(stream), 1)
    with skipped(model, run, range(model.n_layers), stream[:, None]):
        return _last_logits(model, ids, torch.zeros_like(ids[:, 0]), None)


def after_attention(
    model: Model, layer: int, stream: Float[Tensor, "token d_model"], write: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token d_model"]:
    """What a block makes of tokens if its attention wrote this: without attention, each token is on its own."""
    constant: Change = lambda _: write[:, None]  # noqa: E731
    with (
        instead([attention(model, layer)], lambda *_inputs, **_named: (write[:, None], None)),
        hooked(model, change={("attention", layer): constant}),  # after the norm that Gemma has there
    ):
        return first_output(block(model, layer)(stream[:, None]))[:, 0]


@contextmanager
def skipped(model: Model, run: Run, layers: Sequence[int], stream: Tensor) -> Iterator[None]:
    """Inside, these blocks run nothing and return `stream`."""
    output = (stream,) if run.wraps else stream
    with instead([block(model, layer) for layer in layers], lambda *_inputs, **_named: output):
        yield


@contextmanager
def _last_mlp_at(model: Model, last: Int[Tensor, " row"], width: int) -> Iterator[None]:
    """Inside, the last MLP is run at these tokens alone; what it then writes elsewhere, nothing reads."""
    rows, module = torch.arange(len(last), device=last.device), mlp(model, model.n_layers - 1)

    def gather(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][rows, last][:, None], *inputs[1:])

    def spread(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.expand(-1, width, -1)

    with ExitStack() as handles:
        handles.callback(module.register_forward_pre_hook(gather).remove)
        handles.callback(module.register_forward_hook(spread).remove)
        yield


def _past(run: Run, rows: Tensor, prefix: int, layer: int) -> DynamicCache:
    """Keys and values of the first tokens; of blocks that are skipped only their number is ever asked for."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(run.keys_values):
        if index < layer:
            counted = keys.new_zeros(1, 1, prefix, 1)
            cache.update(counted, counted, index)
        else:
            cache.update(keys[rows, :, :prefix], values[rows, :, :prefix], index)
    return cache


def _last_logits(model: Model, ids: Tensor, last: Tensor, cache: DynamicCache | None) -> Float[Tensor, "row d_vocab"]:
    """Padding is on the right, where the causal mask hides it, so no attention mask is needed."""
    rows = torch.arange(len(last), device=last.device)

    def keep_last(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][rows, last][:, None], *inputs[1:])

    handle = unembedding(model).register_forward_pre_hook(keep_last)
    try:
        output = model.hf(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    finally:
        handle.remove()
    return exact(output.logits[:, 0])
