"""Dictionaries and codebook models as the command line offers them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechunlearn.checkpoints import choose_device, load_model, save_model
from mechunlearn.codebook import Codebook
from mechunlearn.codebook_model import insert_codebook
from mechunlearn.features.codebook_training import CodebookRecipe, as_task, train_alike, train_codebook
from mechunlearn.features.token_rows import TokenRows, rows_of_texts
from mechunlearn.features.training import DictionaryRecipe
from mechunlearn.files import replaceable, whole_folder
from mechunlearn.models import Model
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.shipped_features import (
    CODEBOOKS,
    HOOK_POINTS,
    LENGTH,
    MEASURED,
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


def codebook(
    name: str, layer: int, options: Mapping[str, Any], out: Path, *, text: Path, compare: bool, device: str,
    on_step: Progress,
) -> pd.DataFrame:  # fmt: skip
    """Train a codebook into a model on a file's text (a passage a line); `out` becomes a model folder that has it.

    What the training goes on from is kept beside, in `out`.training. On CPUs and cards alike it is in float32.

    Args:
        compare: also train the model without a codebook, on the same text and for as many steps.

    Returns:
        One row: mean loss in nats per token on text that was not trained on, of the model as it was, of the one with
        the codebook, of the one trained alike without one, and the difference of these two: what the codebook costs.

    Raises:
        ValueError: an unknown option or layer, a model that has a codebook, or too little text.
    """
    out = replaceable(out, read=[name])
    if "layer" in options:
        raise ValueError(f"codebook: got --set layer={options['layer']}; give it by --layer")
    checked = Method(name="codebook", kind="stage", function=CodebookRecipe, source="")
    recipe = CodebookRecipe(**checked.validate({**options, "layer": layer}))
    where, state = str(choose_device(device)), out.with_name(f"{out.name}.training")
    model = load_model(name, device=where, dtype="float32")
    base, made = model.sha256, Codebook(recipe.shape(model.d_model), seed=recipe.seed)
    rows, unseen = _rows_of(model, text)
    read = text_digest(text)
    found = {"loss before": _loss(model, unseen)}
    insert_codebook(model, made, layer)
    train_codebook(
        model.hf, as_task(rows), recipe, state, text=read, base=base,
        on_step=_told(on_step, f"codebook in layer {layer}", recipe.steps),
    )  # fmt: skip
    found["loss with codebook"] = _loss(model, unseen)
    if compare:
        alike = load_model(name, device=where, dtype="float32")
        train_alike(
            alike.hf, as_task(rows), recipe, state / "alike", text=read, base=base,
            on_step=_told(on_step, "without a codebook", recipe.steps),
        )  # fmt: skip
        found["loss trained alike without"] = _loss(alike, unseen)
        found["cost"] = found["loss with codebook"] - found["loss trained alike without"]
    card = {"of": name, "sha256": base, "recipe": asdict(recipe), "text": read, **found}
    with whole_folder(out) as partial:
        save_model(model, partial)
        (partial / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return pd.DataFrame([found])


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


@torch.no_grad()
def _loss(model: Model, rows: TokenRows) -> float:
    """Mean over a fixed number of batches, in nats per token."""
    batches = (rows(step).to(model.device) for step in range(MEASURED))
    return sum(float(model.hf(input_ids=ids, labels=ids, use_cache=False).loss) for ids in batches) / MEASURED


def _rows_of(model: Model, path: Path) -> tuple[TokenRows, TokenRows]:
    """Rows of nineteen of twenty passages of a file, and of the others, which are not trained on."""
    if not path.is_file():
        raise FileNotFoundError(f"--text: no file {path}; give a text file with a passage a line")
    try:
        passages = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"--text: {path} is not UTF-8; save the file as UTF-8") from None
    kept, unseen = [line for i, line in enumerate(passages) if i % 20], passages[::20]
    try:
        measured_on = rows_of_texts(model, unseen, rows=ROWS, length=LENGTH)
    except ValueError as error:
        raise ValueError(f"--text: every twentieth passage is kept to measure on, and of these: {error}") from None
    return rows_of_texts(model, kept, rows=ROWS, length=LENGTH), measured_on


def text_digest(path: Path) -> str:
    """Names a text by what it says."""
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _told(on_step: Progress, what: str, steps: int) -> OnStep:
    return lambda step, loss: on_step(f"{what}: {loss:.3f}", step, steps)
