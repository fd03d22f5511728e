"""Which components an option `kinds` means, and the refusal of options that name nothing or something twice."""

from collections.abc import Sequence

from mechunlearn.components import KINDS, Component, Kind
from mechunlearn.models import Model, all_components


def components_of(
    model: Model, method: str, kinds: Sequence[Kind], allowed: Sequence[Kind] = KINDS
) -> tuple[Component, ...]:
    """Every component of the given kinds, each kind once.

    Raises:
        ValueError: no kinds, or a single word instead of several.
    """
    if not kinds or isinstance(kinds, str):
        raise ValueError(f"{method}: option 'kinds': got {kinds or 'none'}, allowed: a list of {', '.join(allowed)}")
    return all_components(model, tuple(dict.fromkeys(kinds)))


def each_once(method: str, **options: Sequence[str]) -> None:
    """Refuse options that name nothing, or something twice.

    Raises:
        ValueError: such an option.
    """
    for option, given in options.items():
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{method}: option '{option}': got {list(given)}, allowed: one or more, each once")
