"""Models whose truth is known: knowledge hidden on purpose (one file a kind of suppression), taught, or made up."""

from collections.abc import Callable
from typing import Any

from mechunlearn.registry import Registry

SUPPRESSIONS = Registry("suppression", package=__name__)


def __getattr__(name: str) -> Callable[..., Any]:
    """Every registered suppression is an attribute; its file is imported on first use."""
    return SUPPRESSIONS.attribute(name)
