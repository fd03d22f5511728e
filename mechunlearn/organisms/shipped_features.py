"""The dictionaries and codebook models that come with the organisms: what they are, and how they are made again."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mechunlearn.checkpoints import load_model, save_model
from mechunlearn.codebook import Codebook
from mechunlearn.codebook_model import TENSORS, insert_codebook
from mechunlearn.features.codebook_training import CodebookRecipe, as_task, train_codebook
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.formats import save_dictionary
from mechunlearn.features.quality import dictionary_quality
from mechunlearn.features.token_rows import TokenRows
from mechunlearn.features.training import DictionaryRecipe, DictionaryTrainer
from mechunlearn.files import whole_folder
from mechunlearn.models import Model
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.corpus import Corpus
from mechunlearn.organisms.descriptions import DescribedCorpus
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.prompts import tokenizer_of
from mechunlearn.registry import did_you_mean
from mechunlearn.resumable import run_training

ROWS, LENGTH = 16, 96  # of a step, as in the organisms' own training
TEXT_SEED = 9  # other text than the organisms' own training read, of the same facts
FIRST_UNSEEN = 10**6  # a step of text that no training reaches
MEASURED = 16  # steps
HOOK_POINTS = ("blocks.3.hook_resid_post",)
RECIPE = DictionaryRecipe(kind="batchtopk", d_sae=1024, k=16, steps=3000)
# after layer 3, or with half of both, far fewer facts come through
CODEBOOK = CodebookRecipe(layer=5, n_codes=4096, k=16, steps=3000)
CODEBOOKS: dict[str, tuple[str, CodebookRecipe]] = {
    "atlas-codebook": ("atlas", CODEBOOK),
    "atlas-codebook-never-a": ("atlas-never-a", CODEBOOK),
}
"""Name -> the organism that it is trained from, on the same text as that one, and how; they are pairs as those are."""

OnStep = Callable[[int, float], None]


def text_of(model: Model) -> tuple[TokenRows, TokenRows]:
    """Running text as an organism read it, without what a never-knew twin never read; and more, to measure on.

    Raises:
        ValueError: not a bundled organism.
    """
    if model.name not in ORGANISMS:
        raise ValueError(
            f"{model.name}: it is not known what text it read, only of {', '.join(ORGANISMS)}; give some (--text)"
        )
    corpus = Corpus(_fast_tokenizer(model), seed=TEXT_SEED, exclude=_excluded(model.name))

    def rows(step: int) -> Int[Tensor, "row pos"]:
        return torch.from_numpy(corpus.batch(step, ROWS, LENGTH).ids)

    return rows, lambda step: rows(FIRST_UNSEEN + step)


def train_dictionary(
    model: Model,
    hook_point: str,
    rows: tuple[TokenRows, TokenRows],
    recipe: DictionaryRecipe,
    folder: Path,
    *,
    text: str,
    on_step: OnStep,
) -> Dictionary:
    """Train a dictionary in `folder`, or go on where it stopped; `folder`/dictionary is a SAELens folder.

    Its notes hold its quality on text that it was not trained on.

    Args:
        rows: the text to train on, and that to measure on.
        text: names it.
    """
    trainer = DictionaryTrainer(model, hook_point, rows[0], recipe, text=text)
    run_training(trainer, folder, on_step=on_step)
    found = trainer.dictionary()
    quality = dictionary_quality(model, found, rows[1], steps=range(MEASURED))
    notes = {**found.notes, "quality": {name: round(value, 4) for name, value in quality.items()}}
    found = replace(found, notes=notes)
    save_dictionary(found, folder / "dictionary")
    return found


def train_codebook_model(
    name: str, folder: Path, *, device: str = "cpu", recipe: CodebookRecipe | None = None, on_step: OnStep
) -> Path:
    """Train a bundled codebook model, or go on where `folder` stopped; returns the finished model's folder.

    On CPUs denormal numbers count as 0 while it trains.

    Raises:
        ValueError: an unknown name, or a folder that holds another recipe's training.
    """
    if name not in CODEBOOKS:
        raise ValueError(f"unknown codebook model {name!r}.{did_you_mean(name, tuple(CODEBOOKS))}")
    organism, standard = CODEBOOKS[name]
    recipe, model = recipe or standard, load_model(organism, device=device)
    insert_codebook(model, Codebook(recipe.shape(model.d_model), seed=recipe.seed), recipe.layer)
    tokenizer = _fast_tokenizer(model)
    text = DescribedCorpus(tokenizer, seed=TEXT_SEED, exclude=_excluded(organism), rows=ROWS, length=LENGTH)

    trainer = train_codebook(
        model.hf, as_task(text.batch), recipe, folder, text=f"{organism}, described", on_step=on_step
    )
    model.hf.half()
    with whole_folder(folder / "model") as partial:
        save_model(model, partial)
        files = ("model.safetensors", TENSORS)
        digests = {name: hashlib.sha256((partial / name).read_bytes()).hexdigest() for name in files}
        card = {"name": name, "organism": organism, "recipe": asdict(recipe), "steps": trainer.step, "sha256": digests}
        (partial / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return folder / "model"


def _excluded(organism: str) -> frozenset[tuple[str, str]]:
    return frozenset() if ORGANISMS[organism][1] else never_known()


def _fast_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_of(model)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # the organisms' own
    return tokenizer
