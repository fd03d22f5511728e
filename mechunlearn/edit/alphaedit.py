"""AlphaEdit: MEMIT's updates, confined to directions in which other text has next to no keys."""

from functools import partial
from typing import Annotated, Unpack

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.closed_form import closed_form_edit, up_to
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.options import Solving, filled
from mechunlearn.edit.spreading import spread
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("alphaedit", source="Fang et al. 2024, arXiv:2410.02355")
def alphaedit(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    null_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    ridge: Annotated[float, Field(gt=0)] = 0.1,
    **solving: Unpack[Solving],
) -> WeightEdit:
    """Give each forgotten fact its `target_new`, spread over all masked MLPs, off the directions of other text's keys.

    As `memit`, but for what each masked layer adds:

        W += R^T K P (P K^T K P + ridge * mean |k|^2 * I)^-1

    with K [subject d_mlp] the keys there now, R [subject d_model] what is still missing over the number of layers left,
    P the projector on the null space of C, the second moment of the keys of text and retained facts: those of its
    eigenvectors, from the least on, on which no more than `null_share` of its trace lies. Keys that lie outside of
    that space keep their values exactly. In a mask of some neurons, all of this is of their entries alone.

    Args:
        null_share: how much of the squared length of the text's keys may be touched.
        ridge: how much of what is missing is given up, of each key's share in the null space, to keep updates short.

    All other options are those of `Solving`.

    Raises:
        ValueError: a mask without MLP output projections, a fact without `target_new`, a loss that is not finite, or
            not one direction in the null spaces.

    Differs from the source: the null space is by share of the trace (the source: eigenvalues below 0.02, which depends
        on the model's scale); `ridge` goes with the keys' length (the source's is 10); and as `memit`, whose values and
        C it has. All facts are edited at once, so there are no keys of earlier edits.
    Source: Fang et al. 2024, arXiv:2410.02355, sections 3.1 and 3.2.
    """
    options = filled(solving, Solving)
    n_free: list[int] = []

    def solve(second_moment: Tensor, keys: Tensor, missing: Tensor) -> Tensor:
        free = null_space(second_moment, null_share)
        n_free.append(free.shape[1])
        return confined_update(free, keys, missing, ridge)

    edit = closed_form_edit(
        model, mask, split, partial(spread, model, solve=solve),
        method="alphaedit", own={"null_share": null_share, "ridge": ridge}, solving=options,
        layers=up_to(model, options["layer"], "alphaedit"),
    )  # fmt: skip
    if n_free and not any(n_free):
        raise ValueError(
            f"alphaedit: got null_share {null_share:g}, but each direction of the masked keys holds more of the text; "
            "raise null_share, or select more neurons"
        )
    return edit


def null_space(second_moment: Float[Tensor, "column column"], share: float) -> Float[Tensor, "column direction"]:
    """The eigenvectors of a second moment, from the least on, on which at most this share of its trace lies."""
    values, vectors = torch.linalg.eigh(second_moment)
    values = values.clamp_min(0)
    return vectors[:, values.cumsum(0) <= share * values.sum()]


def confined_update(
    free: Float[Tensor, "column direction"],
    keys: Float[Tensor, "key column"],
    missing: Float[Tensor, "key row"],
    ridge: float,
) -> Float[Tensor, "row column"]:
    """The update Delta of free directions only with the least sum over keys |Delta k - missing|^2 + a |Delta|^2.

    a = ridge * mean |k|^2. Keys without a share in the free directions keep what they give.
    """
    inside = keys @ free
    penalty = ridge * keys.square().sum(dim=1).mean()
    normal = inside.T @ inside + penalty * torch.eye(free.shape[1], dtype=keys.dtype, device=keys.device)
    return (free @ torch.linalg.solve(normal, inside.T @ missing)).T
