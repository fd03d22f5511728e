"""Find where a language model looks facts up, edit only there, attack the result, and decide: removed or hidden?

            facts --+
                    +--> localize --> ComponentScores --> masks --> ParameterMask --> edit --> WeightEdit
    model  ---------+        |                                                          |   with applied(model, edit):
       |                     +--------------- figures / notebooks <------------+        v
       +-- never-knew twin ----------> verdict <-- attack, evaluate (never see hidden facts before scoring)

Five verbs (localize, edit, evaluate, attack, report) are packages, because methods multiply there, and so is `features`
(guards of activations); everything passed between them is a frozen noun in one file. Importing this package loads
neither torch nor TransformerLens.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechunlearn import attack, edit, evaluate, features, localize, report
    from mechunlearn.checkpoints import load_model, save_model
    from mechunlearn.codebook import Codebook
    from mechunlearn.codebook_model import insert_codebook, insert_in_encoder
    from mechunlearn.components import Component, ComponentScores
    from mechunlearn.edit.edits import WeightEdit, applied, export_edit, load_edit, save_edit
    from mechunlearn.edit.sequential import edit_sequentially
    from mechunlearn.edit.stack import EditStack
    from mechunlearn.edit.stack_files import load_stack, save_stack
    from mechunlearn.encoder_decoder import load_encoder_decoder, save_encoder_decoder
    from mechunlearn.explorer import explore
    from mechunlearn.facts import Fact, FactSet, FactSplit, split_facts, with_edit_targets
    from mechunlearn.features.code_choice import choose_codes
    from mechunlearn.features.codebook_training import CodebookRecipe, CodebookTrainer, train_codebook
    from mechunlearn.features.deletion import CodeDeletion, erase_codes, load_deletion, save_deletion
    from mechunlearn.features.guard import Guard, attach, load_guard, save_guard
    from mechunlearn.features.topics import substituted
    from mechunlearn.masks import ParameterMask, mask_of, select_components
    from mechunlearn.models import Model, wrap_model
    from mechunlearn.random_masks import random_mask_like, random_matrices
    from mechunlearn.selection import select_entries, select_exactly
    from mechunlearn.sources.loading import load_facts
    from mechunlearn.verdict import Verdict, decide

__version__ = "0.1.0"

_HOME = {
    "CodeDeletion": "features.deletion",
    "Codebook": "codebook",
    "CodebookRecipe": "features.codebook_training",
    "CodebookTrainer": "features.codebook_training",
    "Component": "components",
    "ComponentScores": "components",
    "EditStack": "edit.stack",
    "Fact": "facts",
    "FactSet": "facts",
    "FactSplit": "facts",
    "Guard": "features.guard",
    "Model": "models",
    "ParameterMask": "masks",
    "Verdict": "verdict",
    "WeightEdit": "edit.edits",
    "applied": "edit.edits",
    "attach": "features.guard",
    "choose_codes": "features.code_choice",
    "decide": "verdict",
    "edit_sequentially": "edit.sequential",
    "erase_codes": "features.deletion",
    "explore": "explorer",
    "export_edit": "edit.edits",
    "insert_codebook": "codebook_model",
    "insert_in_encoder": "codebook_model",
    "load_deletion": "features.deletion",
    "load_edit": "edit.edits",
    "load_encoder_decoder": "encoder_decoder",
    "load_facts": "sources.loading",
    "load_guard": "features.guard",
    "load_model": "checkpoints",
    "load_stack": "edit.stack_files",
    "mask_of": "masks",
    "random_mask_like": "random_masks",
    "random_matrices": "random_masks",
    "save_deletion": "features.deletion",
    "save_edit": "edit.edits",
    "save_encoder_decoder": "encoder_decoder",
    "save_guard": "features.guard",
    "save_model": "checkpoints",
    "save_stack": "edit.stack_files",
    "select_components": "masks",
    "select_entries": "selection",
    "select_exactly": "selection",
    "split_facts": "facts",
    "substituted": "features.topics",
    "train_codebook": "features.codebook_training",
    "with_edit_targets": "facts",
    "wrap_model": "models",
}
_VERBS = ("attack", "edit", "evaluate", "features", "localize", "report")

__all__ = [
    "CodeDeletion",
    "Codebook",
    "CodebookRecipe",
    "CodebookTrainer",
    "Component",
    "ComponentScores",
    "EditStack",
    "Fact",
    "FactSet",
    "FactSplit",
    "Guard",
    "Model",
    "ParameterMask",
    "Verdict",
    "WeightEdit",
    "applied",
    "attach",
    "attack",
    "choose_codes",
    "decide",
    "edit",
    "edit_sequentially",
    "erase_codes",
    "evaluate",
    "explore",
    "export_edit",
    "features",
    "insert_codebook",
    "insert_in_encoder",
    "load_deletion",
    "load_edit",
    "load_encoder_decoder",
    "load_facts",
    "load_guard",
    "load_model",
    "load_stack",
    "localize",
    "mask_of",
    "random_mask_like",
    "random_matrices",
    "report",
    "save_deletion",
    "save_edit",
    "save_encoder_decoder",
    "save_guard",
    "save_model",
    "save_stack",
    "select_components",
    "select_entries",
    "select_exactly",
    "split_facts",
    "substituted",
    "train_codebook",
    "with_edit_targets",
    "wrap_model",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name in _VERBS:
        return import_module(f"mechunlearn.{name}")
    if name in _HOME:
        return getattr(import_module(f"mechunlearn.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mechunlearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
