"""ROME: one fact after another, each by a rank-one update of one MLP's output projection."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.edit import EDITORS
from mechunlearn.edit.closed_form import Moments, closed_form_edit, up_to
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.keys_values import Row
from mechunlearn.edit.least_squares import damped, masked_update
from mechunlearn.edit.options import Solving, filled
from mechunlearn.edit.projections import Projections
from mechunlearn.edit.value_search import ValueSearch, found_values
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("rome", source="Meng et al. 2022, arXiv:2202.05262")
def rome(
    model: Model,
    mask: ParameterMask,
    split: FactSplit,
    **solving: Unpack[Solving],
) -> WeightEdit:
    """Give each forgotten fact its `target_new` by a rank-one update of one masked MLP's output projection.

    Subjects come one after another, each on the weights that the ones before have left. A vector added to what the
    projection writes at the subject's last token is searched by gradient until `target_new` follows
    (`edit.value_search`); with k the key there, and missing that vector,

        W += missing (C^-1 k)^T / (k^T C^-1 k)

    so that W k is the value, and C, the second moment of the keys of text and retained facts, says which other keys to
    spare. Key and value are means over the same texts (the bare prompt and the prefixed ones), as in "r-ROME": the
    source's code has the bare prompt's key in the denominator alone, which breaks models. Only masked entries change;
    in a mask of some neurons, all of this is of their entries.

    Args:
        layer: whose MLP is edited; None is the middle one of those that the mask selects, the lower of two.

    All other options are those of `Solving`.

    Raises:
        ValueError: a mask without MLP output projections or without this layer's, a fact without `target_new`, a
            loss that is not finite, or a layer after which nothing reads the subject's last token.

    Differs from the source: as `memit` does in values and C; and its code averages over the tokens of an answer. On
        Gemma the value is what the projection writes, before the norm that follows.
    Source: Meng et al. 2022, arXiv:2202.05262, section 3.1; Gupta et al. 2024, arXiv:2403.07175 (r-ROME).
    """
    options = filled(solving, Solving)

    def one_after_another(
        weights: Projections, moments: Moments, rows: Sequence[Row], search: ValueSearch
    ) -> Float[Tensor, "step subject"]:
        (here,) = weights.layers
        losses = []
        for subject in dict.fromkeys(row.subject for row in rows):
            own = [replace(row, subject=0) for row in rows if row.subject == subject]
            key, missing, loss = found_values(model, weights, here, own, search)
            weights.add(here, masked_update(weights.allowed(here), moments[here], key, missing, rank_one))
            losses.append(loss)
        return torch.cat(losses, dim=1)

    def middle(masked: list[int]) -> list[int]:
        chosen = up_to(model, options["layer"], "rome")(masked)
        return chosen[-1:] if options["layer"] is not None else [chosen[(len(chosen) - 1) // 2]]

    return closed_form_edit(
        model, mask, split, one_after_another,
        method="rome", own={}, solving=options, layers=middle,
    )  # fmt: skip


def rank_one(
    second_moment: Float[Tensor, "column column"], key: Float[Tensor, "1 column"], missing: Float[Tensor, "1 row"]
) -> Float[Tensor, "row column"]:
    """The update that adds `missing` to what the key gives, and changes what C's keys give as little as can be.

    Delta = missing (C^-1 k)^T / (k^T C^-1 k), with C damped.
    """
    direction = torch.linalg.solve(damped(second_moment), key[0])
    return torch.outer(missing[0], direction) / (key[0] @ direction)
