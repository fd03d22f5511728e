"""Dictionaries on disk: SAELens folders, read and written, and Gemma Scope's params.npz, read."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mechunlearn.features.dictionary import TENSORS, Dictionary, Kind
from mechunlearn.files import whole_folder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
KINDS: dict[str, Kind] = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
"""SAELens' architectures -> ours."""
WRITTEN_FOR = "6.54.12"  # SAELens drops the hook's name of folders that name no version from 6 on
OURS = "mechunlearn"  # key of SAELens' metadata, of which it keeps what it does not know


def load_dictionary(path: str | Path, *, hook_point: str | None = None, model_name: str | None = None) -> Dictionary:
    """Read a SAELens folder (or its cfg.json), or a params.npz of Gemma Scope. Nothing is unpickled.

    Directions stay as they are on disk: `fold_decoder_norm` makes them unit vectors, and the dictionary says so.

    Args:
        hook_point: of the activation, where the file does not say (Gemma Scope's never does).
        model_name: in place of what the file says.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: damaged, of a kind that is not supported, without a hook point, or with another one than is given.
    """
    path = Path(path)
    path = path.parent if path.name == CONFIG else path
    if path.suffix == ".npz":
        found = _gemma_scope(path)
    elif (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        found = _saelens(path)
    else:
        raise FileNotFoundError(f"no dictionary at {path}; give a folder with {CONFIG} and {WEIGHTS}, or a params.npz")
    own, model = found["hook_point"], model_name or found["model_name"] or ""
    found = {key: value for key, value in found.items() if key not in ("hook_point", "model_name")}
    if own and hook_point and own != hook_point:
        raise ValueError(f"{path} is of {own}, got hook point {hook_point}; leave it out")
    hook = own or hook_point
    if not hook:
        raise ValueError(f"{path} does not say which activation it is of; give hook_point (blocks.3.hook_resid_post)")
    try:
        return Dictionary(hook_point=hook, model_name=model, **found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Write a SAELens folder, all or nothing; what SAELens has no key for (folding, training) is in its metadata."""
    architecture = next(name for name, kind in KINDS.items() if kind == dictionary.kind)
    dtype = str(dictionary.weights["W_enc"].dtype).removeprefix("torch.")
    config: dict[str, Any] = {
        "architecture": architecture, "d_in": dictionary.d_in, "d_sae": dictionary.d_sae, "dtype": dtype,
        "device": "cpu", "apply_b_dec_to_input": dictionary.subtracts_bias,
        "normalize_activations": dictionary.scaling, "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": WRITTEN_FOR, "hook_name": dictionary.hook_point, "model_name": dictionary.model_name,
            OURS: {"is_folded": dictionary.is_folded, "notes": dict(dictionary.notes)},
        },
    }  # fmt: skip
    if dictionary.kind == "topk":
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": dictionary.scales_by_norm}
    if dictionary.hook_point.endswith("hook_z"):
        config["reshape_activations"] = "hook_z"
    with whole_folder(Path(folder)) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        save_file(
            {name: value.cpu().contiguous().clone() for name, value in dictionary.weights.items()}, partial / WEIGHTS
        )


def _saelens(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is no dictionary: {str(error).splitlines()[0]}") from None
    config = _flattened(config)
    architecture = config.get("architecture", "standard")
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":  # before version 6
        architecture, config = "topk", {**config, **config.get("activation_fn_kwargs", {})}
    if architecture not in KINDS:
        raise ValueError(f"{folder}: got architecture {architecture!r}, allowed: {', '.join(KINDS)}")
    if (weights.get("scaling_factor", torch.ones(1)) == 1).all():
        weights.pop("scaling_factor", None)
    ours = config.get(OURS) or {}
    return {
        "kind": KINDS[architecture], "weights": weights,
        "k": int(config["k"]) if architecture == "topk" else None,
        "subtracts_bias": bool(config.get("apply_b_dec_to_input", True)),
        "scales_by_norm": architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm", False)),
        "scaling": _scaling(folder, config.get("normalize_activations")),
        "is_folded": bool(ours.get("is_folded", False)), "notes": ours.get("notes", {}),
        "hook_point": config.get("hook_name") or config.get("hook_point"), "model_name": config.get("model_name"),
    }  # fmt: skip


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata has a key of its own from version 6 on."""
    return {**config, **(config.get("metadata") or {})}


def _scaling(folder: Path, given: object) -> str:
    """How vectors are scaled; what training folds into the weights afterwards is nothing to do any more."""
    if given is True or given in ("expected_average_only_in", "covariance_whitening"):
        warnings.warn(
            f"{folder}: normalize_activations is {given!r}, which SAELens folds into the weights after training; "
            "if these were saved before, features are of the wrong size",
            stacklevel=3,
        )
        return "none"
    return str(given) if given else "none"


def _gemma_scope(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no dictionary at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            weights = {name: torch.from_numpy(file[name]).float() for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no params.npz: {str(error).splitlines()[0]}") from None
    if set(weights) != set(TENSORS["jumprelu"]):
        raise ValueError(f"{path}: got {', '.join(sorted(weights))}, a params.npz has {', '.join(TENSORS['jumprelu'])}")
    return {"kind": "jumprelu", "weights": weights, "hook_point": None, "model_name": None}
