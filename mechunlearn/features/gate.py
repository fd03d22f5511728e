"""Gates: is this text about what is to be forgotten? Decided token by token from what went before, and calibrated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechunlearn.features.attached import Memory

GateKind = Literal["share", "window", "cusum"]
Scope = Literal["token", "sequence"]


class TooFewTexts(ValueError):
    """So few that no threshold is sure to be passed seldom enough."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Scores of every token of a text from which tokens hold a chosen feature; open where they exceed `threshold`.

    - share: tokens so far that hold one / content tokens so far; with the scope "token" these count as at least
      `width`, so that a hit among the first tokens is not a share of 1, with the scope "sequence" it is DSG's rho;
    - window: share of the last `width` tokens that hold one;
    - cusum: max(0, score before + log of how much likelier this token is in text to forget), Page 1954.

    No score looks ahead, at padding or at other texts, so texts give the same one alone, in a batch, and one token at
    a time.
    """

    kind: GateKind = "share"
    threshold: float = 0.0
    scope: Scope = "token"
    """token: each token is decided by the score up to it.

    sequence: all tokens of a forward pass by the score at its end, DSG's own way on whole texts. With a cache of keys
    and values every pass decides anew, by all that was seen so far, and tokens that have passed keep their decision. So
    where the decision turns in the course of a text, reading on with a cache differs from reading the text anew, which
    decides its earlier tokens, too, by the score at its end. Up to there both agree, and so do texts in which it never
    turns."""
    width: int = 8
    """Of the window, in tokens; and the least number of them that a share with the scope "token" is taken of."""
    rates: tuple[float, float] = (0.5, 0.05)
    """Of cusum: share of content tokens with a chosen feature in text to forget, and in text to retain."""
    target_rate: float | None = None
    """The share of texts to retain on which it was calibrated to open."""
    achieved_rate: float | None = None
    """The share of other texts to retain on which it did open; None where it was not measured."""
    n_calibrated: int = 0

    def __post_init__(self) -> None:
        on, off = self.rates
        if not 0 < off < on < 1:
            raise ValueError(f"gate: got rates {self.rates}, allowed: 1 > rate to forget > rate to retain > 0")
        if self.width < 1:
            raise ValueError(f"gate: got a width of {self.width}, allowed: 1 or more tokens")

    def scores(self, on: Bool[Tensor, "batch pos"], content: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """The score at every token of texts, each from its beginning."""
        on = on & content
        if self.kind == "share":
            counts = content.double().cumsum(1).clamp(min=self.width if self.scope == "token" else 1)
            return on.double().cumsum(1) / counts
        if self.kind == "window":
            return F.pad(on.double(), (self.width - 1, 0)).unfold(1, self.width, 1).mean(-1)
        p, q = self.rates
        gain = torch.where(on, math.log(p / q), math.log((1 - p) / (1 - q))).double() * content
        walk = F.pad(gain.cumsum(1), (1, 0))
        return (walk - walk.cummin(1).values)[:, 1:]

    def is_open(
        self, on: Bool[Tensor, "batch pos"], content: Bool[Tensor, "batch pos"], memory: Memory
    ) -> Bool[Tensor, "batch pos"]:
        """Whether the gate is open at every token.

        Args:
            memory: of the texts' tokens before these, empty at a beginning; these are added to it.
        """
        flags = torch.stack([on, content], dim=-1)
        memory["flags"] = flags = torch.cat([memory["flags"], flags], dim=1) if memory else flags
        scores = self.scores(*(whole := flags.unbind(-1)))
        if self.scope == "sequence":
            return _at_end(scores, whole[1]).expand(on.shape) > self.threshold
        return scores[:, -on.shape[1] :] > self.threshold

    def peaks(self, flags: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
        """Of each text, (on, content) a token, the highest score that could open the gate.

        That of any token, or with the scope "sequence" the last one.
        """
        if not flags:
            return np.zeros(0)
        on, content = (pad_sequence([one[part] for one in flags], batch_first=True) for part in (0, 1))
        scores = self.scores(on, content)  # no score looks at padding, and none is higher there than before
        return (_at_end(scores, content)[:, 0] if self.scope == "sequence" else scores.max(1).values).numpy()


def _at_end(scores: Tensor, content: Tensor) -> Float[Tensor, "batch 1"]:
    """The score at the last content token of each text, whatever padding follows; at the first one if it has none."""
    last = content.long() * torch.arange(1, content.shape[1] + 1, device=content.device)
    return scores.gather(1, last.argmax(1, keepdim=True))


def calibrated(
    gate: Gate,
    retain: Sequence[tuple[Tensor, Tensor]],
    *,
    rate: float = 0.05,
    method: Literal["quantile", "conformal"] = "conformal",
    held_out: Sequence[tuple[Tensor, Tensor]] = (),
) -> Gate:
    """The gate with the threshold at which it opens on at most `rate` of the texts to retain.

    quantile: that of their peaks, as DSG does. conformal: their ceil((n + 1)(1 - rate))-th smallest peak, with which a
    new text of the same kind opens it with a probability of at most `rate`, whatever the distribution.

    Args:
        retain: (tokens that hold a chosen feature, content tokens) of each text.
        held_out: other such texts, on which the achieved rate is measured.

    Raises:
        ValueError: no texts, or a rate outside (0, 1).
        TooFewTexts: for the rate.

    Source: Vovk et al. 2005 (split-conformal); Muhamed et al. 2025, arXiv:2504.08192 (quantile).
    """
    peaks = np.sort(gate.peaks(retain))
    if not 0 < rate < 1 or not len(peaks):
        raise ValueError(f"gate: got a rate of {rate} and {len(peaks)} texts, allowed: a rate in (0, 1), some texts")
    rank = math.ceil((len(peaks) + 1) * (1 - rate))
    if method == "conformal" and rank > len(peaks):
        raise TooFewTexts(f"gate: {len(peaks)} texts cannot vouch for a rate of {rate}; give {math.ceil(1 / rate)}")
    threshold = float(peaks[rank - 1]) if method == "conformal" else float(np.quantile(peaks, 1 - rate))
    found = replace(gate, threshold=threshold, target_rate=rate, n_calibrated=len(peaks))
    opened = float((found.peaks(held_out) > threshold).mean()) if held_out else None
    return replace(found, achieved_rate=opened)
