"""Dictionaries that come with the bundled organisms, by model and hook point, or any other by its path."""

from importlib.resources import files
from pathlib import Path

from mechunlearn.codebook_model import codebook_in
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.formats import load_dictionary
from mechunlearn.models import Model


def bundled_dictionaries(model_name: str) -> dict[str, Path]:
    """Hook point -> folder, of those that come with a model."""
    home = Path(str(files("mechunlearn"))) / "features" / "dictionaries" / Path(model_name).name
    return {path.name: path for path in sorted(home.iterdir())} if home.is_dir() else {}


def dictionary_of(model: Model, name: str, hook_point: str | None = None) -> Dictionary:
    """The dictionary at a path, or else the one of that hook point that comes with the model.

    Args:
        hook_point: of its activation, where a file at a path does not say.

    Raises:
        FileNotFoundError: neither.
        ValueError: no hook point, or another one than the file says.
    """
    bundled = bundled_dictionaries(model.name)
    if name in bundled:
        return load_dictionary(bundled[name], hook_point=hook_point)
    if Path(name).exists():
        return load_dictionary(name, hook_point=hook_point)
    known = ", ".join(bundled) or "none"
    if codebook_in(model.hf) is not None:
        known += "; its codebook is for --method code_deletion"
    raise FileNotFoundError(f"no dictionary {name!r}: give its folder, or one that comes with {model.name}: {known}")
