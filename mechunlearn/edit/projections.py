"""The masked output projections of a model under edit, and the passage from what they write to the residual stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.activations import untouched
from mechunlearn.edit.training import substituted
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model, mlp_neurons, mlp_write, oriented


def projection_weight(model: Model, layer: int) -> str:
    """The parameter name of the weight of a layer's MLP output projection."""
    return f"{model.architecture.blocks}.{layer}.{model.architecture.mlp_out}.weight"


def masked_projections(
    model: Model, mask: ParameterMask, method: str, layers: Callable[[list[int]], list[int]] = list
) -> ParameterMask:
    """The part of a mask that is in weights of MLPs' output projections; nothing of an empty mask.

    Args:
        layers: which of the layers found, ascending; called if there are any.

    Raises:
        ValueError: a mask that selects something, but nothing there.
    """
    found = {layer: projection_weight(model, layer) for layer in range(model.n_layers)}
    found = {layer: name for layer, name in found.items() if name in mask.entries and bool(mask.entries[name].any())}
    chosen = {layer: found[layer] for layer in layers(list(found))} if found else {}
    if mask.n_selected and not chosen:
        raise ValueError(
            f"{method}: got a mask without output projections of MLPs (it names {next(iter(mask.entries))}), allowed: "
            f"entries of {projection_weight(model, 0)} or of other layers; select MLPs or neurons"
        )
    return ParameterMask(
        entries={name: mask.entries[name] for name in chosen.values()},
        shapes={name: mask.shapes[name] for name in chosen.values()},
        components=tuple(c for c in mask.components if c.kind in ("mlp", "neuron") and c.layer in chosen),
    )


class Projections:
    """Masked output projections: kept in float64 as [d_model d_mlp], rounded into the model whenever they change."""

    def __init__(self, model: Model, mask: ParameterMask) -> None:
        self._model, self._mask = model, mask
        self._parameters = {name: model.hf.get_parameter(name) for name in mask.entries}
        self._exact = {name: oriented(model, name, p.detach()).double() for name, p in self._parameters.items()}
        self.layers = [layer for layer in range(model.n_layers) if projection_weight(model, layer) in mask.entries]
        """Ascending."""

    def allowed(self, layer: int) -> Bool[Tensor, "d_model d_mlp"]:
        """The entries of a layer's projection that may change."""
        name = projection_weight(self._model, layer)
        return oriented(self._model, name, self._mask.full(name)).to(self._model.device)

    def outputs(self, layer: int, keys: Float[Tensor, "key d_mlp"]) -> Float[Tensor, "key d_model"]:
        """What a layer's projection makes of the keys, its bias included; in float64."""
        bias = getattr(mlp_neurons(self._model, layer), "bias", None)
        outputs = keys @ self._exact[projection_weight(self._model, layer)].T
        return outputs if bias is None else outputs + bias.detach().double()

    @torch.no_grad()
    def add(self, layer: int, update: Float[Tensor, "d_model d_mlp"]) -> None:
        """Add an update, which is 0 outside of what is allowed, to a layer's projection."""
        name = projection_weight(self._model, layer)
        self._exact[name] = self._exact[name] + update
        self._parameters[name].copy_(oriented(self._model, name, self._exact[name]))

    def values(self) -> dict[str, Tensor]:
        """The allowed entries as they are now, as a WeightEdit holds them."""
        return {
            name: parameter.detach()[self._mask.full(name).to(parameter.device)].cpu()
            for name, parameter in self._parameters.items()
        }


@contextmanager
def projections(model: Model, mask: ParameterMask) -> Iterator[Projections]:
    """Inside, the masked projections may be changed and nothing has gradients; afterwards the model is the old one."""
    now = {name: model.hf.get_parameter(name).detach() for name in mask.entries}
    with untouched(model), substituted(model, now):
        yield Projections(model, mask)


@torch.no_grad()
def before_norm(
    model: Model, layer: int, outputs: Float[Tensor, "key d_model"], missing: Float[Tensor, "key d_model"]
) -> Float[Tensor, "key d_model"]:
    """What must be added to the outputs of a layer's projection for `missing` to be added to the residual stream.

    The same, unless a norm stands between them (Gemma): post(u) = g * u / rms(u). As post takes away the length of its
    input, post(u + missing * rms(u) / g) has the direction of post(u) + missing, and such length as g gives it.
    Gains near 0 are taken as a twentieth of their root mean square.
    """
    if model.architecture.mlp_write == model.architecture.mlp:
        return missing
    ones = torch.ones(1, model.d_model, device=model.device, dtype=model.dtype)
    gain = mlp_write(model, layer)(ones)[0].double()
    least = gain.square().mean().sqrt() / 20
    gain = torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp_min(least)
    return missing * outputs.square().mean(dim=1, keepdim=True).sqrt() / gain
