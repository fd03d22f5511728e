"""Trying to get the facts back: model + split -> AttackResult, one file an attack."""

from collections.abc import Callable
from typing import Any

from mechunlearn.registry import Registry

ATTACKS = Registry("attack", package=__name__)


def __getattr__(name: str) -> Callable[..., Any]:
    """Every registered attack is an attribute; its file is imported on first use."""
    return ATTACKS.attribute(name)
