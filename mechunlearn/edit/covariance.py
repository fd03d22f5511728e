"""Second moments of what the MLPs' output projections read: estimated once over running text, kept on disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechunlearn.activations import Place, exact, hooked, untouched
from mechunlearn.files import whole_file
from mechunlearn.metrics import pad_right
from mechunlearn.models import Model
from mechunlearn.prompts import encode, max_positions

FORMAT = "mechunlearn second moment 1"


def cache_folder(cache: bool | str = True) -> Path | None:
    """Where second moments are kept.

    Args:
        cache: a folder; True is $MECHUNLEARN_CACHE, else mechunlearn/ in $XDG_CACHE_HOME or ~/.cache; False is nowhere.
    """
    if isinstance(cache, str):
        return Path(cache)
    if not cache:
        return None
    if own := os.environ.get("MECHUNLEARN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechunlearn"


def second_moments(
    model: Model,
    layers: Sequence[int],
    texts: Sequence[str],
    *,
    max_tokens: int = 128,
    batch_size: int = 32,
    cache: Path | None = None,
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """C = E[k k^T] of the keys k that the output projections of the layers' MLPs read, over all tokens of the texts.

    Not centred. Products are taken in float32 (or the model's dtype if that is better), summed in float64 and kept in
    float32, on the CPU. One forward pass over the texts at most; no more than one batch of activations is in memory.

    Args:
        max_tokens: tokens of a text that are read, from its start.
        batch_size: texts in a forward pass.
        cache: a folder. A layer found there for the same weights and the same tokens is read and not measured; anything
            else there, a damaged file too, is measured anew and written over. None: neither read nor write.

    Raises:
        ValueError: no text of one token or more.

    Source: Meng et al. 2022, arXiv:2202.05262, section 3.1 (C), estimated on the caller's text, not on Wikipedia.
    """
    width = max_positions(model, max_tokens)
    rows = [row[:width] for row in encode(model, texts) if row]
    if not rows:
        raise ValueError(f"second moment: got {len(texts)} texts, none of one token or more; give some text")
    wanted = list(dict.fromkeys(layers))
    if cache is None:
        return _measured(model, wanted, rows, batch_size)
    records = _records(model, wanted, rows)
    found = {layer: _read(model, _path(cache, records[layer]), records[layer]) for layer in wanted}
    missing = [layer for layer in wanted if found[layer] is None]
    for layer, value in _measured(model, missing, rows, batch_size).items():
        with whole_file(_path(cache, records[layer])) as partial:
            save_file({"second_moment": value}, partial, metadata={"record": records[layer]})
        found[layer] = value
    return {layer: cast(Tensor, found[layer]) for layer in wanted}


@torch.no_grad()
def _measured(model: Model, layers: Sequence[int], rows: Sequence[Sequence[int]], size: int) -> dict[int, Tensor]:
    if not layers:
        return {}
    places: dict[int, Place] = {layer: ("neuron", layer) for layer in layers}
    zero = torch.zeros(model.d_mlp, model.d_mlp, dtype=torch.float64, device=model.device)
    total = {layer: zero.clone() for layer in layers}
    ordered = sorted(rows, key=len)  # little padding; the order of a sum
    with untouched(model), hooked(model, record=tuple(places.values())) as seen:
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            ids = pad_right(model, batch)
            lengths = torch.tensor([len(row) for row in batch], device=model.device)
            model.hf.base_model(ids, use_cache=False)  # no logits
            real = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
            for layer, place in places.items():
                keys = exact(seen[place][real])
                total[layer] += keys.T @ keys
    n = sum(map(len, rows))
    return {layer: (value / n).to("cpu", torch.float32) for layer, value in total.items()}


def _records(model: Model, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[int, str]:
    """Everything a layer's second moment depends on, as canonical JSON: the name of its file and its own check."""
    data = hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()
    common = {"format": FORMAT, "model_sha256": model.sha256, "tokens_sha256": data, "n_texts": len(rows)}
    return {layer: json.dumps({**common, "layer": layer}, sort_keys=True) for layer in layers}


def _path(folder: Path, record: str) -> Path:
    return folder / f"second_moment-{hashlib.sha256(record.encode()).hexdigest()[:32]}.safetensors"


def _read(model: Model, path: Path, record: str) -> Tensor | None:
    """What the file holds, or None if there is none, it is damaged, or it is about something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("record") != record:
                return None
            value = file.get_tensor("second_moment")
    except (SafetensorError, OSError):
        return None
    fits = value.shape == (model.d_mlp, model.d_mlp) and value.dtype == torch.float32
    return value if fits and bool(value.isfinite().all()) else None
