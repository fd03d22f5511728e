"""What every trained editor takes: the options of the loop, of what is kept, and of when to stop."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from pydantic import Field
from pydantic.fields import FieldInfo

from mechunlearn.edit.losses import Forms
from mechunlearn.edit.prefix import DEFAULT_GB
from mechunlearn.edit.training import Schedule

RetainLoss = Literal["answer", "kl"]


class Training(TypedDict, total=False):
    """Options of a trained editor; each with its default and what it means.

    loss = the method's own terms + retain_weight * retain loss on `retain_train`, half of it of the forgotten relations
    + text_weight * negative log-likelihood per token of running text. AdamW without weight decay; the norm of the
    gradient is clipped at 1; only masked entries have gradients and optimizer state.
    """

    steps: Annotated[int, Field(ge=0, default=50)]
    learning_rate: Annotated[float, Field(gt=0, default=1e-3)]
    schedule: Annotated[Schedule, Field(default="cosine", description="of the learning rate; cosine falls to 0")]
    batch_size: Annotated[
        int,
        Field(ge=1, default=32, description="rows of facts of each kind in a forward pass, an eighth as many of text"),
    ]
    accumulation: Annotated[int, Field(ge=1, default=1, description="batches of each kind in one step")]
    retain_weight: Annotated[float, Field(ge=0, default=1.0)]
    retain_loss: Annotated[
        RetainLoss,
        Field(default="answer", description="-log P(true answer), or KL(original || edited) where it is predicted"),
    ]
    text_weight: Annotated[float, Field(ge=0, default=1.0)]
    forms: Annotated[
        Forms, Field(default="prompt", description="what is trained on: canonical prompts, or paraphrases as well")
    ]
    text: Annotated[
        Sequence[str] | None, Field(default=None, description="to stay fluent on; None: bundled neutral text")
    ]
    rank: Annotated[
        int | None,
        Field(ge=1, default=None, description="train a low-rank update of each masked matrix, inside the mask"),
    ]
    max_damage: Annotated[
        float | None,
        Field(gt=0, default=None, description="nats: the edit ends where it disturbs retained facts more; see budget"),
    ]
    prefix_cache_gb: Annotated[
        float,
        Field(
            ge=0, default=DEFAULT_GB, description="memory for what the blocks below the mask compute; 0: anew each step"
        ),
    ]
    checkpoint: Annotated[
        bool, Field(default=False, description="run blocks again in the backward pass: less memory, a third more time")
    ]
    seed: Annotated[int, Field(default=0)]


class Unkept(Training, total=False):
    """`Training` of a method that by its source has no retain and no text term: by default both weigh nothing."""

    retain_weight: Annotated[float, Field(ge=0, default=0.0)]
    text_weight: Annotated[float, Field(ge=0, default=0.0)]


Filled = Mapping[str, Any]
"""Every option of `Training`, by name."""


def filled(given: Mapping[str, Any], kind: type = Training) -> Filled:
    """The options given, with the defaults of the others.

    Args:
        kind: `Training`, or one of its variants with other defaults: the one that the editor's `**training` unpacks.

    Raises:
        TypeError: an option that there is not.
    """
    fields = get_type_hints(kind, include_extras=True)
    if unknown := sorted(given.keys() - fields.keys()):
        raise TypeError(f"editor: got an unexpected option {unknown[0]!r}, allowed: {', '.join(fields)}")
    return {name: given.get(name, _default(annotation)) for name, annotation in fields.items()}


def _default(annotation: Any) -> Any:
    return next(part for part in annotation.__metadata__ if isinstance(part, FieldInfo)).default
