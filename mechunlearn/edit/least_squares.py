"""Updates of weights within a mask, by least squares on keys and on what is missing of their values.

An update Delta [d_model d_mlp] of a projection adds Delta k to what it makes of a key k. Each of its rows is a problem
of its own, so a mask of any shape is kept by solving each row for its allowed entries alone, on these entries of the
keys: nothing else changes, and the result is the best that the mask allows.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Solve = Callable[
    [Float[Tensor, "column column"], Float[Tensor, "key column"], Float[Tensor, "key row"]], Float[Tensor, "row column"]
]
"""(second moment of keys that matter, keys, what is missing of their values) -> update; all in float64."""

DAMPING = 1e-4
"""In mean eigenvalues of a second moment."""


def masked_update(
    allowed: Bool[Tensor, "d_model d_mlp"],
    second_moment: Float[Tensor, "d_mlp d_mlp"],
    keys: Float[Tensor, "key d_mlp"],
    missing: Float[Tensor, "key d_model"],
    solve: Solve,
) -> Float[Tensor, "d_model d_mlp"]:
    """The update within the allowed entries, 0 elsewhere; rows with the same allowed entries are solved at once."""
    update = torch.zeros_like(allowed, dtype=keys.dtype)
    patterns, pattern_of = allowed[:1], torch.zeros(len(allowed), dtype=torch.long, device=allowed.device)
    if not torch.equal(allowed, patterns.expand_as(allowed)):  # else sorting rows would take seconds in large models
        patterns, pattern_of = torch.unique(allowed, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        columns, rows = pattern.nonzero()[:, 0], (pattern_of == number).nonzero()[:, 0]
        here = keys[:, columns]
        if bool(here.any()):  # keys that are 0 there get nothing from there
            update[rows[:, None], columns] = solve(second_moment[columns[:, None], columns], here, missing[:, rows])
    return update


def damped(second_moment: Float[Tensor, "column column"]) -> Float[Tensor, "column column"]:
    """C + DAMPING * mean(diag C) * I: can be inverted, and what the text never shows is not free to change."""
    ridge = DAMPING * second_moment.diagonal().mean()
    return second_moment + ridge * torch.eye(len(second_moment), dtype=second_moment.dtype, device=second_moment.device)
