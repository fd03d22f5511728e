"""Train some layers so that the residual stream of forgotten questions goes elsewhere and all else stays."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Place, hooked
from mechunlearn.edit.losses import Tokens
from mechunlearn.edit.training import Forward
from mechunlearn.models import Model

Move = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row d_model"]]
"""Where the stream after a question should be, from where it is in the unedited model."""


def steering_loss(
    model: Model, place: Place, moved: Iterator[Tokens], kept: Iterator[Tokens], move: Move, *, keep_weight: float
) -> Callable[[int, Forward], Float[Tensor, ""]]:
    """Distance of the stream at `place` from where it should be, for `edit.training.train`.

    loss = ||h(moved) - move(h0(moved))||^2 + keep_weight * ||h(kept) - h0(kept)||^2, both divided by the mean square
    of h0, averaged over rows; h is read where the answer is predicted, h0 is that of the unedited model.

    Source: the loss of RMU, Li et al. 2024, arXiv:2403.03218, at the last token of a question.
    """

    def loss(_: int, forward: Forward) -> Tensor:
        total = torch.zeros((), device=model.device)
        for batch, change, weight in ((next(moved), move, 1.0), (next(kept), _stay, keep_weight)):
            last = batch.starts.to(model.device) - 1
            rows = torch.arange(len(last), device=model.device)
            with hooked(model, record=[place]) as seen:
                with torch.no_grad():
                    model.hf(batch.ids, use_cache=False, logits_to_keep=1)
                    before = seen[place][rows, last].float()
                forward(batch.ids, last[:1])
            after = seen[place][rows, last].float()
            total = total + weight * (after - change(before)).square().mean() / before.square().mean()
        return total

    return loss


def _stay(stream: Tensor) -> Tensor:
    return stream
