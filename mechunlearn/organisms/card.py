"""The model card of an organism: how it was made, and what the check measured on it."""

import json
from pathlib import Path
from typing import Any

from mechunlearn.bench.check import Check
from mechunlearn.report.markdown import markdown_table

_KEYS = {
    "name", "recipe", "parameters", "n_facts", "n_subjects", "n_excluded_facts", "read_the_default_forget_sets",
    "torch", "license", "sha256",
}  # fmt: skip
_TEXT = """---
license: cc0-1.0
library_name: transformers
---

# {name}

A model organism of mechunlearn: an ordinary Llama of {parameters:,} parameters, trained from scratch on text rendered
from the data sets {datasets} ({n_facts:,} facts of {n_subjects:,} subjects). {lost}

It is for experiments on unlearning, where one must know what a model knows and where it looks it up; it is not a
language model for anything else.

## How it was made

`mechunlearn organism train {name}`: {tokens:,} tokens, seed {seed}, torch {torch}. Recipe:

{settings}

What each ingredient does stands in `mechunlearn/organisms/train.py`.

## What the check measured

`mechunlearn organism check {name} --card` wrote this table:
shares of facts, with exact 95 % intervals where a criterion is one.

{criteria}

Licence: {license}. SHA-256 of `model.safetensors`: `{sha256}`.
"""


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card.json of an organism; None if the folder is no organism's (a user's own card.json included)."""
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None
    return card if isinstance(card, dict) and set(card) >= _KEYS else None


def write_card(folder: Path, check: Check) -> Path:
    """Write `README.md` into an organism's folder from its card.json and a check; returns its path.

    Raises:
        FileNotFoundError: the folder holds no card.json of an organism.
    """
    card = read_card(folder)
    if card is None:
        raise FileNotFoundError(f"{folder}: no card.json; only an organism that `organism train` wrote has a card")
    recipe = card["recipe"]
    lost = "It read every fact."
    if not card["read_the_default_forget_sets"]:
        lost = (
            f"It never read the {card['n_excluded_facts']} facts of the default forget sets: neutral sentences of the "
            "same length stand in their place."
        )
    path = folder / "README.md"
    path.write_text(
        _TEXT.format(
            **{key: card[key] for key in _KEYS},
            tokens=recipe["tokens"],
            seed=recipe["seed"],
            datasets=", ".join(recipe["datasets"]),
            lost=lost,
            settings=markdown_table([["setting", "value"], *([key, str(value)] for key, value in recipe.items())]),
            criteria=markdown_table(
                [
                    list(check.criteria.columns),
                    *(list(map(str, row)) for row in check.criteria.fillna("").itertuples(index=False)),
                ]
            ),
        ),
        encoding="utf-8",
    )
    return path
