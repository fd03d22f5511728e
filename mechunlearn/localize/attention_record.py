"""What attention computes inside: queries, keys, values and patterns, and what a query or key alone would change."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from mechunlearn.activations import exact
from mechunlearn.localize.pairs import PairBatch
from mechunlearn.models import Model, NotSupported

_NAME = "mechunlearn_recorded"


@dataclass(frozen=True, kw_only=True)
class Attended:
    """One layer's attention. Keys and values stand once for every query head, after rotation."""

    queries: Float[Tensor, "batch head pos d_head"]
    keys: Float[Tensor, "batch head pos d_head"]
    values: Float[Tensor, "batch head pos d_head"]
    pattern: Float[Tensor, "batch head query key"]
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores of queries against keys before the mask, [..., query, key]."""
        scores = queries @ keys.transpose(-1, -2) * self.scaling
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


@dataclass
class AttentionRecord:
    """What the last forward pass attended to, by layer."""

    layers: dict[int, Attended] = field(default_factory=dict)
    expected: int = 0

    def take(self) -> dict[int, Attended]:
        """Hand over what was recorded and forget it.

        Raises:
            NotSupported: some layer's attention does not go through the function that records.
        """
        found, self.layers = self.layers, {}
        if len(found) != self.expected:
            raise NotSupported(
                f"attention of {self.expected - len(found)} layers cannot be watched in this architecture; "
                "use qk_fix = false"
            )
        return found


@contextmanager
def recorded_attention(model: Model) -> Iterator[AttentionRecord]:
    """Inside, attention is computed plainly and kept, in whatever implementation the model is configured for.

    Raises:
        NotSupported: on `take`, where attention does not go through Hugging Face's interface (GPT-Neo).
    """
    record = AttentionRecord(expected=model.n_layers)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, softcap: float | None = None, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = None if attention_mask is None else attention_mask[:, :, :, : key.shape[-2]]
        plain = Attended(queries=query, keys=key, values=value, pattern=query, mask=mask, scaling=factor,
                         softcap=softcap)  # fmt: skip
        scores = exact(plain.logits(query, key))
        pattern = (scores if mask is None else scores + mask).softmax(-1).to(value.dtype)
        kept = {**plain.__dict__, "queries": query.detach(), "keys": key.detach(), "pattern": pattern}
        record.layers[int(module.layer_idx)] = Attended(**kept)  # pyright: ignore[reportArgumentType]
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    config = model.hf.config
    own = config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    try:
        config._attn_implementation = _NAME
        yield record
    finally:
        config._attn_implementation = own
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)


def _columns(tensor: Float[Tensor, "batch head query key"], positions: Tensor) -> Tensor:
    """[batch head query aligned], the keys at the aligned tokens."""
    index = positions[:, None, None, :].expand(*tensor.shape[:3], -1)
    return tensor.gather(-1, index)


def _without_each_key(
    scores: Float[Tensor, "batch head query key"], gradient: Float[Tensor, "batch head query key"]
) -> tuple[Tensor, Tensor]:
    """For every key: log of the sum of the others' exponentials, and the gradient's mean under the others' softmax.

    The highest key is left out before anything is summed: where it has all the attention, to the last bit, what the
    others would share is still exact. The sum without any other key holds the highest, so subtracting loses nothing.
    """
    top, highest = scores.max(-1, keepdim=True)
    weight = (scores - top).exp()
    total = weight.sum(-1, keepdim=True) - weight
    mean = ((weight * gradient).sum(-1, keepdim=True) - weight * gradient) / total
    others = scores.scatter(-1, highest, float("-inf"))
    theirs = (others.softmax(-1) * gradient).sum(-1, keepdim=True).nan_to_num()  # NaN: the only key that is seen
    rest = (total.log() + top).scatter(-1, highest, others.logsumexp(-1, keepdim=True))
    return rest, mean.scatter(-1, highest, theirs)


def head_effects(
    batch: PairBatch, clean: Attended, corrupt: Attended, pattern_gradient: Tensor, value_gradient: Tensor
) -> Float[Tensor, "batch head role"]:
    """What the clean queries, keys and values do to the metric, each alone, summed: the softmax exact, the rest linear.

    A query at one token changes its own row of the pattern; a key at one token changes a column, and so the sums of all
    rows that see it.

    Source: Kramár et al. 2024, arXiv:2403.00745, section 3.1.1 and appendix on the key computation.
    """
    gradient, pattern = exact(pattern_gradient), exact(corrupt.pattern.detach())
    at, there = batch.corrupt_positions, batch.clean_positions

    def rows(tensor: Tensor, positions: Tensor) -> Tensor:
        """[batch head pos ...] at the aligned tokens."""
        return exact(tensor.transpose(1, 2)[torch.arange(len(positions))[:, None], positions].transpose(1, 2))

    masked = torch.zeros_like(pattern) if corrupt.mask is None else exact(corrupt.mask).expand_as(pattern)
    scores = corrupt.logits(rows(clean.queries, there), exact(corrupt.keys)) + rows(masked, at)
    by_query = ((scores.softmax(-1) - rows(pattern, at)) * rows(gradient, at)).sum(-1)

    old = corrupt.logits(exact(corrupt.queries), exact(corrupt.keys)) + masked
    new = corrupt.logits(exact(corrupt.queries), rows(clean.keys, there)) + _columns(masked, at)
    rest, mean = _without_each_key(old, gradient)
    rest, mean, old, own = (_columns(found, at) for found in (rest, mean, old, gradient))
    share, changed = torch.sigmoid(old - rest), torch.sigmoid(new - rest)
    by_key = ((changed - share) * (own - mean)).sum(-2)

    moved = rows(clean.values, there) - rows(corrupt.values.detach(), at)
    by_value = (moved * rows(value_gradient, at)).sum(-1)
    return torch.einsum("bha,bar->bhr", by_query + by_key + by_value, batch.roles.to(by_query.dtype))
