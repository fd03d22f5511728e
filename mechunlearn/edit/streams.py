"""Train the residual stream of some tokens to go elsewhere, or to stay where it was."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.activations import Place, hooked
from mechunlearn.edit.losses import Loss, Tokens
from mechunlearn.edit.training import Forward
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model, block

Move = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]
"""Where the stream should be, from where it is in the unedited model."""

Where = Callable[[Tokens], Bool[Tensor, "row pos"]]
"""Which tokens of a batch count."""


def predicting(batch: Tokens) -> Bool[Tensor, "row pos"]:
    """The tokens after which a target is predicted."""
    return batch.is_target.roll(-1, dims=1)


def prompt_tokens(batch: Tokens) -> Bool[Tensor, "row pos"]:
    """All tokens before the first target, but not the very first.

    Every text begins alike, and large models keep an attention sink there, whose stream is many times as long as that
    of other tokens and would outweigh them (Sun et al. 2024, arXiv:2402.17762).
    """
    return _up_to(batch, batch.starts)


def all_tokens(batch: Tokens) -> Bool[Tensor, "row pos"]:
    """All tokens, targets included, but not the very first; see `prompt_tokens`."""
    return _up_to(batch, batch.lengths)


def _up_to(batch: Tokens, ends: Tensor) -> Bool[Tensor, "row pos"]:
    position = torch.arange(batch.ids.shape[1])
    # a prompt of one token has that one only
    return ((position < ends[:, None]) & ((position > 0) | (ends[:, None] == 1))).to(batch.ids.device)


def stream_loss(
    model: Model, place: Place, rows: Iterator[Tokens], move: Move = lambda stream: stream, where: Where = predicting
) -> Loss:
    """Distance of the stream at `place` from where it should be (where it was, unless told), for `edit.training.train`.

    loss = ||h - move(h0)||^2 / ||h0||^2, both averaged over the tokens that count (where an answer is predicted, unless
    told); h0 is the stream of the unedited model. Nothing after `place` is computed.

    Sign and units: at least 0, and 0 where every stream is where it should be; 1 is the length of the stream, squared.

    Source: the two terms of RMU, Li et al. 2024, arXiv:2403.03218.
    """

    def loss(_: int, forward: Forward) -> Tensor:
        batch = next(rows)
        counts, one = where(batch), torch.zeros(1, dtype=torch.long, device=model.device)
        with torch.no_grad():
            before = _stream_at(
                model, place, lambda: model.hf(batch.ids, use_cache=False, logits_to_keep=one)
            )[counts].float()  # fmt: skip
        after = _stream_at(model, place, lambda: forward(batch.ids, one))[counts].float()
        return (after - move(before)).square().mean() / before.square().mean()

    return loss


class _Reached(Exception):
    """The forward pass has come to the place, which is as far as anyone wants it."""


def _stream_at(model: Model, place: Place, run: Callable[[], Any]) -> Float[Tensor, "row pos d_model"]:
    seen: list[Tensor] = []

    def stop(stream: Tensor) -> Tensor:
        seen.append(stream)
        raise _Reached

    with hooked(model, change={place: stop}), contextlib.suppress(_Reached):
        run()
    return seen[0]


def masked_layers(model: Model, mask: ParameterMask) -> tuple[int, ...]:
    """The layers in which a mask selects anything, in order."""
    parameters = dict(model.hf.named_parameters())
    selected = {id(parameters[name]) for name in mask.entries}
    return tuple(
        layer
        for layer in range(model.n_layers)
        if any(id(parameter) in selected for parameter in block(model, layer).parameters())
    )
