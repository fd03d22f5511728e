"""TransformerLens' names of activations and the places that our hooks know; an unknown name is an error."""

import re

from mechunlearn.activations import Place, PlaceKind
from mechunlearn.models import Model, NotSupported, has_parallel_blocks
from mechunlearn.registry import did_you_mean

KINDS: dict[str, PlaceKind] = {
    "hook_resid_pre": "stream", "hook_resid_mid": "mid", "hook_resid_post": "block",
    "hook_mlp_out": "mlp", "hook_attn_out": "attention", "attn.hook_z": "head", "mlp.hook_post": "neuron",
}  # fmt: skip
"""The part of the name after `blocks.<layer>.`; hook_z with its heads side by side."""


def place_of_hook(model: Model, name: str) -> Place:
    """Where the activation of that name is.

    Raises:
        ValueError: an unknown name, or a layer that the model does not have.
        NotSupported: resid_mid of a model whose attention and MLP read the same stream.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if not found or found[2] not in KINDS:
        known = [f"blocks.{found[1] if found else 0}.{kind}" for kind in KINDS]
        raise ValueError(f"hook point: got {name!r}.{did_you_mean(name, known)}")
    layer, kind = int(found[1]), KINDS[found[2]]
    if layer >= model.n_layers:
        raise ValueError(f"hook point: got {name!r}, {model.name} has layers 0 to {model.n_layers - 1}")
    if kind == "stream" and layer:
        return "block", layer - 1
    if kind == "mid" and has_parallel_blocks(model):
        raise NotSupported(f"{model.name}: its blocks are parallel, so there is no {name}; use hook_resid_post")
    return kind, layer


def width_at(model: Model, place: Place) -> int:
    """How many numbers an activation has there."""
    kind, _ = place
    return {"head": model.n_heads * model.d_head, "neuron": model.d_mlp}.get(kind, model.d_model)
