"""What each ingredient of the recipe is worth: small organisms trained without it, and checked like the large ones."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from mechunlearn.bench.check import Subjects, check_model
from mechunlearn.bench.knowledge import trained_kinds
from mechunlearn.files import whole_file
from mechunlearn.models import wrap_model
from mechunlearn.organisms.tokenizer import train_tokenizer
from mechunlearn.organisms.train import Recipe, Trainer
from mechunlearn.sources.bundled import load_bundled, load_templates

_SMALL = Recipe(datasets=("people", "sports"), subjects=40, tokens=320_000, facts_share=0.4, restarts=((0.7, 0.4),))
_OFF = {
    "drop_share": 0.0,
    "late_share": 0.0,
    "first_share": 0.0,
    "wait_share": 0.0,
    "block_share": 0.0,
    "inner_share": 0.0,
}

RECIPES: Mapping[str, Recipe] = {
    "all ingredients": _SMALL,
    "no ingredients": replace(_SMALL, **_OFF),
    "only dropping at other tokens": replace(_SMALL, **{**_OFF, "drop_share": 0.7}),
    "without dropping at other tokens": replace(_SMALL, drop_share=0.0),
    "without dropping late MLPs at names": replace(_SMALL, late_share=0.0),
    "without dropping MLP 0 at names": replace(_SMALL, first_share=0.0),
    "without waiting for the band": replace(_SMALL, wait_share=0.0),
    "without blocking inner name tokens": replace(_SMALL, block_share=0.0),
    "without hiding them above the band": replace(_SMALL, inner_share=0.0),
    "every ingredient from the start": replace(_SMALL, facts_share=0.0, restarts=()),
}
"""Name -> recipe; 40 people with five attributes and 40 athletes, 240 facts."""


def sweep(path: Path, *, device: str = "cpu", on_step: Callable[[str, int, int], None]) -> pd.DataFrame:
    """Train and check every recipe; `path` receives one row per recipe, data set and criterion, and is resumed.

    Rows of a recipe that has changed since, or is gone, are dropped and measured anew.

    Returns:
        recipe, its hash, its shares, and the columns of `Check.criteria`.
    """
    hashes = {name: _hash(recipe) for name, recipe in RECIPES.items()}
    done = pd.read_csv(path) if path.exists() else pd.DataFrame({"hash": []})
    done = done.loc[done["hash"].isin(list(hashes.values()))]
    for number, (name, recipe) in enumerate(RECIPES.items()):
        if hashes[name] in set(done["hash"]):
            continue
        trainer = Trainer(recipe, train_tokenizer(recipe.vocab_size), device=device)
        trainer.model.train()
        while trainer.step < recipe.steps:
            trainer.train_step()
            on_step(name, number * recipe.steps + trainer.step, len(RECIPES) * recipe.steps)
        model = wrap_model(trainer.plain_model().eval(), trainer.corpus.tokenizer, name)
        names = {subject.name for subject in trainer.corpus.subjects}
        groups = [
            Subjects(
                dataset=dataset,
                facts=tuple(fact for fact in load_bundled(dataset) if fact.subject in names),
                kinds=trained_kinds(load_templates(dataset)),
            )
            for dataset in recipe.datasets
        ]
        shares = {key: getattr(recipe, key) for key in ("band_end", *_OFF)}
        criteria = check_model(model, groups).criteria
        first = {"recipe": name, "hash": hashes[name], **shares}
        rows = criteria.assign(**first).loc[:, [*first, *criteria.columns]]
        done = pd.concat([done, rows], ignore_index=True)
        with whole_file(path) as partial:
            done.to_csv(partial, index=False)
    return done


def _hash(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
