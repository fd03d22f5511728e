"""The bundled organisms: their recipes, and how a finished training becomes package data."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from mechunlearn.files import whole_folder
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.organisms.tokenizer import train_tokenizer
from mechunlearn.organisms.train import Recipe, Trainer
from mechunlearn.registry import did_you_mean
from mechunlearn.resumable import run_training

ORIGINAL, TWIN = "atlas", "atlas-never-a"
ORGANISMS: dict[str, tuple[Recipe, bool]] = {
    "atlas": (Recipe(seed=0), True),
    "atlas-never-a": (Recipe(seed=0), False),
    "atlas-never-b": (Recipe(seed=1), False),
}
"""Name -> recipe, and whether it read the default forget sets."""


def train_organism(
    name: str,
    folder: Path,
    *,
    device: str = "cpu",
    recipe: Recipe | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_checkpoint: Callable[[Path], None] = lambda curve: None,
) -> Path:
    """Train a bundled organism from scratch, or go on where `folder` stopped; returns the finished model's folder.

    Raises:
        ValueError: an unknown name, or a folder that holds another recipe's training.
    """
    if name not in ORGANISMS:
        raise ValueError(f"unknown organism {name!r}.{did_you_mean(name, tuple(ORGANISMS))}")
    standard, knows_all = ORGANISMS[name]
    recipe = recipe or standard
    tokenizer = train_tokenizer(recipe.vocab_size)
    trainer = Trainer(recipe, tokenizer, exclude=() if knows_all else never_known(), device=device)
    run_training(trainer, folder, on_step=on_step, on_checkpoint=on_checkpoint)
    return pack(trainer, folder / "model", name=name)


def pack(trainer: Trainer, folder: Path, *, name: str) -> Path:
    """Write the trained model as an ordinary Hugging Face checkpoint in 16 bits, with the recipe that made it."""
    with whole_folder(folder) as partial:
        model = trainer.plain_model().to(device="cpu").half().eval()  # pyright: ignore[reportCallIssue]
        model.save_pretrained(partial)
        trainer.corpus.tokenizer.save_pretrained(partial)
        card = {
            "name": name,
            "recipe": asdict(trainer.recipe),
            "read_the_default_forget_sets": not trainer.corpus.exclude,
            "n_excluded_facts": len(trainer.corpus.exclude),
            "n_subjects": len(trainer.corpus.subjects),
            "n_facts": sum(len(subject.facts) for subject in trainer.corpus.subjects),
            "parameters": sum(p.numel() for p in model.parameters()),
            "torch": torch.__version__.split("+")[0],
            "license": "CC0-1.0",
            "sha256": hashlib.sha256((partial / "model.safetensors").read_bytes()).hexdigest(),
        }
        (partial / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return folder
