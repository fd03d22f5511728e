"""Dictionaries and codebook models as the command line offers them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.checkpoints import choose_device, load_model
from mechunlearn.features.token_rows import TokenRows, rows_of_texts
from mechunlearn.features.training import DictionaryRecipe
from mechunlearn.models import Model
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.shipped_features import (
    CODEBOOKS,
    HOOK_POINTS,
    LENGTH,
    RECIPE,
    ROWS,
    OnStep,
    text_of,
    train_codebook_model,
    train_dictionary,
)
from mechunlearn.registry import Method

Progress = Callable[[str, float, float], None]


def train(
    name: str,
    hook_point: str,
    options: Mapping[str, Any],
    out: Path,
    *,
    text: Path | None,
    device: str,
    on_step: Progress,
) -> tuple[pd.DataFrame, Path]:
    """Train a dictionary on a model's own text, or on a file's (a passage a line); what it became, as a table.

    Raises:
        ValueError: an unknown option or hook point, or too little text.
    """
    checked = Method(name="dictionary", kind="stage", function=DictionaryRecipe, source="").validate(options)
    recipe = replace(RECIPE, **{name: checked[name] for name in options})
    model = load_model(name, device=str(choose_device(device)))
    rows = text_of(model) if text is None else _rows_of(model, text)
    folder = out / Path(name).name / hook_point
    found = train_dictionary(
        model, hook_point, rows, recipe, folder, text=text_digest(text) if text else name,
        on_step=_told(on_step, hook_point, recipe.steps),
    )  # fmt: skip
    return pd.DataFrame([found.notes["quality"]]), folder / "dictionary"


def make_shipped(out: Path, *, device: str, on_step: Progress) -> list[Path]:
    """Train everything that comes with the organisms: a dictionary of each, and the codebook models."""
    made: list[Path] = []
    for name in ORGANISMS:
        for hook_point in HOOK_POINTS:
            train(name, hook_point, {}, out, text=None, device=device, on_step=on_step)
            made.append(out / name / hook_point / "dictionary")
    for name, (_, recipe) in CODEBOOKS.items():
        told = _told(on_step, name, recipe.steps)
        made.append(train_codebook_model(name, out / name, device=str(choose_device(device)), on_step=told))
    return made


def _rows_of(model: Model, path: Path) -> tuple[TokenRows, TokenRows]:
    """Rows of nineteen of twenty passages of a file, and of the others, which are not trained on."""
    if not path.is_file():
        raise FileNotFoundError(f"--text: no file {path}; give a text file with a passage a line")
    passages = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept, unseen = [line for i, line in enumerate(passages) if i % 20], passages[::20]
    made = [rows_of_texts(model, part, rows=ROWS, length=LENGTH) for part in (kept, unseen)]
    return made[0], made[1]


def text_digest(path: Path) -> str:
    """Names a text by what it says."""
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _told(on_step: Progress, what: str, steps: int) -> OnStep:
    return lambda step, loss: on_step(f"{what}: {loss:.3f}", step, steps)
