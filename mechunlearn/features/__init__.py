"""Dictionaries of a model's activations, and edits of activations made with them: model + split -> Guard."""

from collections.abc import Callable
from typing import Any

from mechunlearn.registry import Registry

GUARDS = Registry("guard", package=__name__)


def __getattr__(name: str) -> Callable[..., Any]:
    """Every registered guard is an attribute; its file is imported on first use."""
    return GUARDS.attribute(name)
