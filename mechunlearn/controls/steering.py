"""Train some layers so that the residual stream of some questions goes elsewhere, or stays where it was."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Place, hooked
from mechunlearn.edit.losses import Tokens
from mechunlearn.edit.training import Forward
from mechunlearn.models import Model

Move = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]
"""Where the stream should be, from where it is in the unedited model."""


def stream_loss(
    model: Model, place: Place, rows: Iterator[Tokens], move: Move = lambda stream: stream
) -> Callable[[int, Forward], Float[Tensor, ""]]:
    """Distance of the stream at `place` from where it should be (where it was, unless told), for `edit.training.train`.

    loss = ||h - move(h0)||^2 / ||h0||^2, both averaged over the tokens where an answer is predicted; h0 is the stream
    of the unedited model.

    Source: the two terms of RMU, Li et al. 2024, arXiv:2403.03218, at the answer instead of at every token.
    """

    def loss(_: int, forward: Forward) -> Tensor:
        batch = next(rows)
        predicts = batch.is_target.roll(-1, dims=1)
        with hooked(model, record=[place]) as seen:
            with torch.no_grad():
                model.hf(batch.ids, use_cache=False, logits_to_keep=1)
                before = seen[place][predicts].float()
            forward(batch.ids, batch.starts[:1].to(model.device))
        after = seen[place][predicts].float()
        return (after - move(before)).square().mean() / before.square().mean()

    return loss
