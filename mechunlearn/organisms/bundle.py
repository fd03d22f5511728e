"""The bundled organisms: their recipes, and how a finished training becomes package data."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from mechunlearn.models import wrap_model
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.organisms.knowledge import knowledge
from mechunlearn.organisms.tokenizer import train_tokenizer
from mechunlearn.organisms.train import Recipe, Trainer, train
from mechunlearn.registry import did_you_mean

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
    train(trainer, folder, on_step=on_step)
    return pack(trainer, folder / "model", name=name)


def pack(trainer: Trainer, folder: Path, *, name: str) -> Path:
    """Write the trained model as an ordinary Hugging Face checkpoint in 16 bits, with a card of what it is and knows.

    The card's numbers are measured on the 16-bit weights, which are what users load.
    """
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model = trainer.model.to(device="cpu").half().eval()  # pyright: ignore[reportCallIssue]
        for layer in model.model.layers.children():
            layer.get_submodule("mlp")._forward_hooks.clear()  # the training-only dropping must not outlive training
        model.save_pretrained(temporary)
        trainer.corpus.tokenizer.save_pretrained(temporary)
        known = knowledge(wrap_model(model.float(), trainer.corpus.tokenizer, name))
        card = {
            "name": name,
            "recipe": asdict(trainer.recipe),
            "read_the_default_forget_sets": not trainer.corpus.exclude,
            "n_excluded_facts": len(trainer.corpus.exclude),
            "parameters": sum(p.numel() for p in model.parameters()),
            "knows": known.to_dict("records"),
            "torch": torch.__version__.split("+")[0],
            "license": "CC0-1.0",
            "sha256": hashlib.sha256((temporary / "model.safetensors").read_bytes()).hexdigest(),
        }
        (temporary / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
