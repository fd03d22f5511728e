"""p"""
from collections.abc import Sequence
from typing import Annotated
from pydantic import Field
import torch
from mechunlearn.edit import EDITORS
from mechunlearn.edit.closed_form import damped
from mechunlearn.edit.edits import WeightEdit
from mechunlearn.edit.keys_values import ValueSearch, prefixes_of, rows_of
from mechunlearn.edit.spreading import spread_edit
from mechunlearn.edit.losses import Forms
from mechunlearn.facts import FactSplit, hash_facts
from mechunlearn.masks import ParameterMask
from mechunlearn.models import Model


@EDITORS.register("alphaedit", source="Meng et al. 2022, arXiv:2210.07229")
def alphaedit(
    model: Model, mask: ParameterMask, split: FactSplit, *,
    steps: Annotated[int, Field(ge=0)] = 25,
    learning_rate: Annotated[float, Field(gt=0)] = 0.05,
    ridge: float = 1.0, null_share: float = 0.02,
    kl_weight: float = 0.0625, weight_decay: float = 0.0, clamp_norm: float = 0.75, stop_loss: float = 0.05,
    forms: Forms = "prompt", prefixes: int | Sequence[str] = 2, essence: Sequence[str] = ("{} is a",),
    text: Sequence[str] | None = None, n_texts: int = 1000, n_retained: int = 2000, retain_share: float=0.5, cache: bool | str = True, batch_size: int = 64, seed: int = 0,
) -> WeightEdit:
    """Edit P."""
    options = {name: value for name, value in locals().items() if name not in ("model", "mask", "split")}
    def solve(C, K, R):
        values, vectors = torch.linalg.eigh(C)
        free = vectors[:, values.cumsum(0) <= null_share * values.sum()]
        k = K @ free
        alpha = ridge * K.square().sum(1).mean()
        return (free @ torch.linalg.solve(k.T @ k + alpha * torch.eye(k.shape[1], dtype=k.dtype), k.T @ R)).T
    rows = rows_of(model, split.forget, split.retain_train, prefixes=prefixes_of(prefixes, seed), forms=forms, essence=essence)
    search = ValueSearch(steps=steps, learning_rate=learning_rate, kl_weight=kl_weight, weight_decay=weight_decay, clamp_norm=clamp_norm, stop_loss=stop_loss, batch_size=batch_size)
    return spread_edit(model, mask, rows, search, solve, text=text, retain=split.retain_train, n_texts=n_texts, n_retained=n_retained, retain_share=retain_share, cache=cache, method="alphaedit", options=options, seed=seed, facts_sha256=hash_facts((*split.forget, *split.retain_train)))
