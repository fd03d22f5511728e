"""What the blocks below the earliest trained one compute, kept from step to step: each row goes through them once.

These blocks never change while others are trained, and padding is on the right, where the causal mask hides it: a row's
stream depends on its own tokens alone, whatever batch it comes in and whoever asks, the edited model or the original.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechunlearn.activations import instead
from mechunlearn.models import Model, block, final_norm, first_output, unembedding
from mechunlearn.prompts import padding_token

GB = 10**9
DEFAULT_GB = 1.0
SERVED = {"use_cache", "logits_to_keep"}  # what a forward pass over right-padded rows may be given besides


def first_layer(model: Model, names: Collection[str]) -> int:
    """The earliest block that holds one of these parameters; 0 if any is elsewhere (an embedding), or there is none."""
    start = f"{model.architecture.blocks}."
    if not names or not all(name.startswith(start) for name in names):
        return 0
    return min(int(name.removeprefix(start).partition(".")[0]) for name in names)


class _Reached(Exception):
    """The forward pass is as far as it is wanted; carries what the last block returned."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@dataclass(kw_only=True, eq=False)
class PrefixCache:
    """The residual stream of rows of tokens before one block, as far as it fits into a number of bytes.

    Within float rounding a forward pass gives what it gives without: rows keep their stream from the batch in which
    they were first seen, and sums over a batch of another shape may be taken in another order.
    """

    model: Model
    layer: int
    limit: int
    """In bytes, on the model's device and in its dtype; rows beyond are computed each time they come."""
    held: int = 0
    """Bytes kept so far."""
    _rows: dict[bytes, Float[Tensor, "pos d_model"]] = field(default_factory=dict)
    _wraps: bool = False  # whether blocks return their stream in a tuple

    @classmethod
    def below(cls, model: Model, names: Collection[str], *, gb: float = DEFAULT_GB) -> "PrefixCache":
        """Before the earliest block that holds one of these parameters."""
        return cls(model=model, layer=first_layer(model, names), limit=int(gb * GB))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, forward passes of the model start at the block, with its own code around; see `_serves` for which.

        The parameters below the block, the embedding among them, must be the same whenever this is active.
        """
        if self.layer == 0 or self.limit == 0:
            yield
            return
        hf, below = self.model.hf, [block(self.model, layer) for layer in range(self.layer)]
        own = hf.forward

        @wraps(own)  # whoever generates looks at its signature
        def restarted(*inputs: Any, **named: Any) -> Any:
            if not _serves(inputs, named) or any(m._forward_hooks or m._forward_pre_hooks for m in self._below):
                return own(*inputs, **named)
            stream = self.streams(inputs[0], own)
            output = (stream,) if self._wraps else stream
            with instead(below, lambda *_inputs, **_named: output):
                return own(*inputs, **named)

        with instead([hf], restarted):
            yield

    def streams(self, ids: Int[Tensor, "row pos"], run: Callable[..., Any]) -> Float[Tensor, "row pos d_model"]:
        """The stream before the block; rows that are not kept yet are run through the blocks below, and kept.

        Args:
            run: the model's own forward.
        """
        width = ids.shape[1]
        # less the padding token padding is zeros, and trimming those at the end leaves the row's own tokens
        less = ids.to("cpu", torch.int64).numpy() - padding_token(self.model)
        keys = [np.trim_zeros(row, "b").tobytes() for row in less]
        found = {key: self._rows[key] for key in keys if key in self._rows and len(self._rows[key]) >= width}
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        if missing:
            for key, stream in zip(missing, self._run(ids[list(missing.values())], run), strict=True):
                found[key] = stream
                self._keep(key, stream)
        return torch.stack([found[key][:width] for key in keys])

    def _keep(self, key: bytes, stream: Tensor) -> None:
        """Keep it if there is room; one that is kept already was of a narrower batch."""
        more = stream.nbytes - (self._rows[key].nbytes if key in self._rows else 0)
        if self.held + more <= self.limit:
            self._rows[key] = stream.clone()  # a view would keep its whole batch
            self.held += more

    @torch.no_grad()
    def _run(self, ids: Int[Tensor, "row pos"], run: Callable[..., Any]) -> Float[Tensor, "row pos d_model"]:
        """Run the blocks below, and nothing above: no hook there may see these rows."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output)

        handle = block(self.model, self.layer - 1).register_forward_hook(stop)
        try:
            run(ids, use_cache=False, logits_to_keep=1)
        except _Reached as reached:
            self._wraps = isinstance(reached.output, tuple)
            return first_output(reached.output)
        finally:
            handle.remove()
        raise RuntimeError(f"block {self.layer - 1} of '{self.model.name}' was not run")

    @cached_property
    def _below(self) -> tuple[nn.Module, ...]:
        """The modules that are not run, or run in vain: one with a hook on it must be."""
        above = [block(self.model, layer) for layer in range(self.layer, self.model.n_layers)]
        run = {module for top in (*above, final_norm(self.model), unembedding(self.model)) for module in top.modules()}
        return tuple(module for module in self.model.hf.modules() if module is not self.model.hf and module not in run)


def _serves(inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Plain passes only: token ids, no mask, positions, embeddings or keys and values that the stream depends on."""
    is_plain = len(inputs) == 1 and torch.is_tensor(inputs[0]) and named.keys() <= SERVED
    return is_plain and named.get("use_cache") is False
