"""Changing only the masked weights: model + mask + split -> WeightEdit, one file a method."""

from collections.abc import Callable
from typing import Any

from mechunlearn.registry import Registry

EDITORS = Registry("editor", package=__name__)


def __getattr__(name: str) -> Callable[..., Any]:
    """Every registered editor is an attribute; its file is imported on first use."""
    return EDITORS.attribute(name)
