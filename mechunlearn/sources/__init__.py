"""Published formats -> FactSet, one file a format."""

from collections.abc import Callable
from typing import Any

from mechunlearn.registry import Registry

SOURCES = Registry("source", package=__name__)


def __getattr__(name: str) -> Callable[..., Any]:
    """Every registered source is an attribute; its file is imported on first use."""
    return SOURCES.attribute(name)
