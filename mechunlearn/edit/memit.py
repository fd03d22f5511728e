"""MEMIT: many facts at once, by one least-squares update of each masked MLP's output projection."""

from functools import partial
from typing import Annotated, Unpack

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.closed_form import closed_form_edit, up_to
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.least_squares import damped
from mechunlearn.edit.options import Solving, filled
from mechunlearn.edit.spreading import spread
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("memit", source="Meng et al. 2022, arXiv:2210.07229")
def memit(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    *,
    covariance_weight: Annotated[float, Field(gt=0)] = 1.5,
    **solving: Unpack[Solving],
) -> WeightEdit:
    """Give each forgotten fact its `target_new`, spread over all masked MLPs, by least squares against other text.

    Values: a vector for each subject, added after the last masked MLP at the subject's last token, is searched by
    gradient until `target_new` follows (`edit.value_search`). Then each masked layer from the first adds its share:

        W += R^T K (covariance_weight * d_mlp * C + K^T K)^-1

    with K [subject d_mlp] the keys there now, R [subject d_model] what is still missing over the number of layers left,
    C the second moment of the keys of text and retained facts. Only masked entries of output projections change.

    Args:
        covariance_weight: 1 meets a key like any of the text's half way; more of it keeps more. In a mask of some
            neurons, d_mlp is their number.
        layer: the layer that values are searched for, and the last that is edited; None is the last that the mask
            selects (the model's last only if it is alone). Later than where attention reads subjects none are found.

    All other options are those of `Solving`.

    Raises:
        ValueError: a mask without MLP output projections or without `layer`, a fact without `target_new`, a loss that
            is not finite, or a layer after which nothing reads the subjects' last tokens.

    Differs from the source: C is of neutral text and retained facts (Wikipedia is what it cannot assume), and damped;
        its weight goes with d_mlp (the source's 15,000 is 0.9 times GPT-J's); streams, like keys, are means over the
        prefixes; facts of one subject share a value; steps and lengths of values are in lengths of the stream; KL is
        taken at the end of the essence prompt; several tokens count as a whole. On Gemma, values are searched before
        the norm that follows the MLP, and shares of the stream taken back through it (`projections.before_norm`).
    Source: Meng et al. 2022, arXiv:2210.07229, sections 4.2 and 4.3.
    """
    options = filled(solving, Solving)
    write = partial(spread, model, solve=partial(against_text, weight=covariance_weight))
    return closed_form_edit(
        model, mask, split, write,
        method="memit", own={"covariance_weight": covariance_weight}, solving=options,
        layers=up_to(model, options["layer"], "memit"),
    )  # fmt: skip


def against_text(
    second_moment: Float[Tensor, "column column"],
    keys: Float[Tensor, "key column"],
    missing: Float[Tensor, "key row"],
    *,
    weight: float,
) -> Float[Tensor, "row column"]:
    """The update Delta that minimises sum over keys |Delta k - missing|^2 + weight * n_columns * tr(Delta C Delta^T).

    Delta = R^T K (weight * n_columns * C + K^T K)^-1, with C damped.
    """
    prior = weight * len(second_moment) * damped(second_moment)
    return torch.linalg.solve(prior + keys.T @ keys, keys.T @ missing).T
