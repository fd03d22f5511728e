"""What the closed-form editors share: the masked output projections, and solving for updates of them.

An update Delta [d_model d_mlp] of a projection W is to change what W makes of given keys by what is missing there, and to
change what it makes of other text's keys little. Each row of Delta is a least-squares problem of its own, so a mask of
any shape is kept by solving for the allowed entries of each row alone: the result is the best that the mask allows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.activations import untouched
from mechunlearn.edit.covariance import cache_folder, second_moments
from mechunlearn.edit.training import substituted
from mechunlearn.facts import Fact
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model, mlp_neurons, mlp_write, oriented
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import render

Solve = Callable[
    [Float[Tensor, "column column"], Float[Tensor, "key column"], Float[Tensor, "key row"]], Float[Tensor, "row column"]
]
"""(second moment of the text's keys, keys, what is missing at each) -> update; all of some columns, in float64."""

DAMPING = 1e-4
"""Added to second moments, times their mean diagonal: directions that the text never takes would else cost nothing."""


def projection_weight(model: Model, layer: int) -> str:
    """The parameter name of the weight of a layer's MLP output projection."""
    return f"{model.architecture.blocks}.{layer}.{model.architecture.mlp_out}.weight"


def masked_projections(model: Model, mask: ParameterMask, method: str) -> ParameterMask:
    """The part of a mask that is in output projections of MLPs; an empty mask of an empty one.

    Raises:
        ValueError: a mask that selects something, but nothing there.
    """
    names = [projection_weight(model, layer) for layer in range(model.n_layers)]
    names = [name for name in names if name in mask.entries and bool(mask.entries[name].any())]
    if mask.n_selected and not names:
        raise ValueError(
            f"{method}: got a mask of {len(mask.entries)} parameters, none of them the output projection of an MLP "
            f"(such as {projection_weight(model, 0)}); select MLPs or their neurons"
        )
    layers = {layer for layer in range(model.n_layers) if projection_weight(model, layer) in names}
    return ParameterMask(
        entries={name: mask.entries[name] for name in names},
        shapes={name: mask.shapes[name] for name in names},
        components=tuple(c for c in mask.components if c.kind in ("mlp", "neuron") and c.layer in layers),
    )


def layers_of(model: Model, mask: ParameterMask) -> list[int]:
    """The layers whose output projections are in the mask, ascending."""
    return [layer for layer in range(model.n_layers) if projection_weight(model, layer) in mask.entries]


def kept_moments(
    model: Model, layers: Sequence[int], retain: Sequence[Fact], text: Sequence[str] | None, *,
    n_texts: int, n_retained: int, retain_share: float, cache: bool | str,
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:  # fmt: skip
    """C = (1 - retain_share) * E[k k^T] over text + retain_share * E[k k^T] over statements of retained facts; float64.

    Only the text's part is kept on disk, for the other one is different with every split.
    """
    texts = neutral_text(n_texts, seed=0) if text is None else text
    statements = [f"{render(fact, 'prompt')} {fact.target_true}." for fact in retain[:n_retained]]
    share = retain_share if statements else 0.0
    parts = [(1 - share, texts, cache_folder(cache)), (share, statements, None)]
    total = dict.fromkeys(layers, torch.zeros((), dtype=torch.float64, device=model.device))
    for weight, passages, folder in parts:
        if weight:
            found = second_moments(model, layers, passages, cache=folder)
            total = {layer: total[layer] + weight * found[layer].to(model.device, torch.float64) for layer in layers}
    return total


def damped(second_moment: Float[Tensor, "column column"]) -> Float[Tensor, "column column"]:
    """C + DAMPING * mean(diag C) * I, which can be inverted."""
    ridge = DAMPING * second_moment.diagonal().mean()
    return second_moment + ridge * torch.eye(len(second_moment), dtype=second_moment.dtype, device=second_moment.device)


def masked_update(
    allowed: Bool[Tensor, "d_model d_mlp"],
    second_moment: Float[Tensor, "d_mlp d_mlp"],
    keys: Float[Tensor, "key d_mlp"],
    missing: Float[Tensor, "key d_model"],
    solve: Solve,
) -> Float[Tensor, "d_model d_mlp"]:
    """The update that is best within the allowed entries, 0 elsewhere; rows with the same entries are solved at once."""
    update = torch.zeros_like(allowed, dtype=keys.dtype)
    patterns, pattern_of = torch.unique(allowed, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        columns, rows = pattern.nonzero()[:, 0], (pattern_of == number).nonzero()[:, 0]
        here = keys[:, columns]
        if bool(here.any()):  # keys that are 0 there cannot be answered there
            update[rows[:, None], columns] = solve(second_moment[columns[:, None], columns], here, missing[:, rows])
    return update


class Projections:
    """The masked output projections of a model under edit: current values in float64, copied into it as they change."""

    def __init__(self, model: Model, mask: ParameterMask) -> None:
        self._model, self._mask = model, mask
        self._parameters = dict(model.hf.named_parameters())
        self._exact = {name: self._kept(name).double() for name in mask.entries}

    def _kept(self, name: str) -> Tensor:
        return oriented(self._model, name, self._parameters[name].detach())

    def allowed(self, layer: int) -> Bool[Tensor, "d_model d_mlp"]:
        """The entries of a layer's projection that may change."""
        name = projection_weight(self._model, layer)
        return oriented(self._model, name, self._mask.full(name)).to(self._model.device)

    def outputs(self, layer: int, keys: Float[Tensor, "key d_mlp"]) -> Float[Tensor, "key d_model"]:
        """What a layer's projection makes of the keys, its bias included."""
        weight = self._exact[projection_weight(self._model, layer)]
        bias = getattr(mlp_neurons(self._model, layer), "bias", None)
        return keys @ weight.T + (0 if bias is None else bias.detach().double())

    @torch.no_grad()
    def add(self, layer: int, update: Float[Tensor, "d_model d_mlp"]) -> None:
        """Change a layer's projection, in the model too, rounded to its dtype."""
        name = projection_weight(self._model, layer)
        self._exact[name] += update
        self._parameters[name].copy_(oriented(self._model, name, self._exact[name]))

    def values(self) -> dict[str, Tensor]:
        """The masked entries as a WeightEdit keeps them."""
        device = self._model.device
        return {
            name: self._parameters[name].detach()[self._mask.full(name).to(device)].cpu() for name in self._mask.entries
        }


@contextmanager
def projections(model: Model, mask: ParameterMask) -> Iterator[Projections]:
    """Inside, the masked projections may be changed; afterwards, also on error, the model is the old one."""
    parameters: Mapping[str, Tensor] = dict(model.hf.named_parameters())
    with untouched(model), substituted(model, {name: parameters[name].detach() for name in mask.entries}):
        yield Projections(model, mask)


def before_norm(
    model: Model, layer: int, outputs: Float[Tensor, "key d_model"], missing: Float[Tensor, "key d_model"]
) -> Float[Tensor, "key d_model"]:
    """What a layer's projection must add to its outputs so that the MLP adds `missing` to the residual stream.

    The same, unless a norm stands between them (Gemma): post(u) = g * u / rms(u). As post does not see the length of u,
    post(u + missing * rms(u) / g) has exactly the direction of post(u) + missing, and its length is what g allows.
    Gains near 0 are taken as a twentieth of their root mean square.
    """
    if model.architecture.mlp_write == model.architecture.mlp:
        return missing
    gain = mlp_write(model, layer)(torch.ones(1, model.d_model, device=model.device, dtype=model.dtype))[0].double()
    least = gain.square().mean().sqrt() / 20
    gain = torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp_min(least)
    return missing * outputs.square().mean(dim=1, keepdim=True).sqrt() / gain
