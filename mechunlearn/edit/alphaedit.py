"""AlphaEdit: MEMIT's updates, confined to directions in which other text has next to no keys."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.closed_form import closed_form_edit
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.losses import Forms
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
    steps: Annotated[int, Field(ge=0)] = 25,
    learning_rate: Annotated[float, Field(gt=0)] = 0.05,
    null_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    ridge: Annotated[float, Field(gt=0)] = 0.1,
    kl_weight: Annotated[float, Field(ge=0)] = 0.0625,
    weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    clamp_norm: Annotated[float, Field(ge=0)] = 0.75,
    forms: Forms = "prompt",
    prefixes: Annotated[int, Field(ge=0)] | Sequence[str] = 2,
    essence: Sequence[str] = ("{} is a",),
    text: Sequence[str] | None = None,
    n_texts: Annotated[int, Field(ge=1)] = 1000,
    retain_share: Annotated[float, Field(ge=0, le=1)] = 0.5,
    cache: bool | str = True,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    seed: int = 0,
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

    All other options are those of `memit`.

    Raises:
        ValueError: a mask without MLP output projections, a fact without `target_new`, a loss that is not finite, or
            not one direction in the null space.

    Differs from the source: the null space is by share of the trace (the source: eigenvalues below 0.02, which depends
        on the model's scale); `ridge` goes with the keys' length (the source's is 10); and as `memit`, whose values and
        C it has. All facts are edited at once, so there are no keys of earlier edits.
    Source: Fang et al. 2024, arXiv:2410.02355, sections 3.1 and 3.2.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "mask", "split", "cache")}

    write = partial(spread, model, solve=partial(off_the_text, null_share=null_share, ridge=ridge))
    return closed_form_edit(model, mask, split, write, method="alphaedit", options=options, cache=cache)


def off_the_text(
    second_moment: Float[Tensor, "column column"],
    keys: Float[Tensor, "key column"],
    missing: Float[Tensor, "key row"],
    *,
    null_share: float,
    ridge: float,
) -> Float[Tensor, "row column"]:
    """The update Delta P that minimises sum over keys |Delta P k - missing|^2 + ridge * mean |k|^2 * |Delta P|^2.

    P projects on the null space, so keys outside of it keep what they give.
    """
    free = null_space(second_moment, null_share)
    inside = keys @ free
    alpha = ridge * keys.square().sum(dim=1).mean() * torch.eye(free.shape[1], dtype=keys.dtype, device=keys.device)
    return (free @ torch.linalg.solve(inside.T @ inside + alpha, inside.T @ missing)).T


def null_space(second_moment: Float[Tensor, "column column"], share: float) -> Float[Tensor, "column direction"]:
    """The eigenvectors of a second moment, from the least on, on which at most this share of its trace lies.

    Raises:
        ValueError: there is none.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    free = vectors[:, values.clamp_min(0).cumsum(0) <= share * values.clamp_min(0).sum()]
    if not free.shape[1]:
        raise ValueError(
            f"alphaedit: got null_share {share:g}, but each of the {len(second_moment)} directions of the keys holds "
            "more of the text; raise null_share"
        )
    return free
