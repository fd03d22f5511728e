"""Where the facts are looked up: model + facts -> ComponentScores, one file a method."""

from collections.abc import Callable
from typing import Any

from mechunlearn.registry import Registry

LOCALIZERS = Registry("localizer", package=__name__)


def __getattr__(name: str) -> Callable[..., Any]:
    """Every registered localizer is an attribute; its file is imported on first use."""
    return LOCALIZERS.attribute(name)
