"""What every trained editor takes (the loop, what is kept, when to stop), and what every closed-form editor takes."""

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
        Field(gt=0, default=None, description="nats: the edit disturbs watched retained facts no more; see budget"),
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


class Solving(TypedDict, total=False):
    """Options of a closed-form editor: of the search for values, of what is kept, and of where to edit."""

    steps: Annotated[int, Field(ge=0, default=25, description="of the search")]
    learning_rate: Annotated[
        float,
        Field(gt=0, default=0.05, description="a step moves a value by about so much of the stream's length"),
    ]
    layer: Annotated[
        int | None,
        Field(
            ge=0,
            default=None,
            description="that values are searched for, the last that is edited; None: by editor",
        ),
    ]
    kl_weight: Annotated[
        float,
        Field(
            ge=0, default=0.0625,
            description="how much the next token after the essence prompts, and after the subjects' own facts in "
            "`retain_train`, is to stay; nats a nat",
        ),
    ]  # fmt: skip
    weight_decay: Annotated[
        float, Field(ge=0, default=0.0, description="on the squared length of a value, in lengths of the stream")
    ]
    clamp_norm: Annotated[float, Field(ge=0, default=0.75, description="the longest value, in lengths of the stream")]
    forms: Annotated[Forms, Field(default="prompt", description="all: values that serve the paraphrases, too")]
    prefixes: Annotated[
        Annotated[int, Field(ge=0)] | Sequence[str],
        Field(
            default=2,
            description="texts, or the number of neutral sentences, that stand before prompts; keys and values are "
            "means over all these and the bare prompt",
        ),
    ]
    essence: Annotated[Sequence[str], Field(default=("{} is a",), description="see kl_weight")]
    text: Annotated[
        Sequence[str] | None,
        Field(default=None, description="to keep the model by; None: `n_texts` passages of the bundled neutral text"),
    ]
    n_texts: Annotated[int, Field(ge=1, default=1000)]
    retain_share: Annotated[
        float, Field(ge=0, le=1, default=0.5, description="the part of C that is of statements of `retain_train`")
    ]
    max_damage: Annotated[
        float | None,
        Field(
            gt=0, default=None,
            description="nats: the whole change is scaled down until it disturbs watched retained facts no more; these "
            "are in no C. See budget",
        ),
    ]  # fmt: skip
    cache: Annotated[
        bool | str,
        Field(
            default=True,
            description="where the text's part of C is kept: a folder, True ($MECHUNLEARN_CACHE or the user's cache) "
            "or False",
        ),
    ]
    batch_size: Annotated[
        int, Field(ge=1, default=64, description="texts in a forward pass; changes nothing but speed")
    ]
    seed: Annotated[int, Field(default=0)]


Filled = Mapping[str, Any]
"""Every option of `Training` or `Solving`, by name."""


def filled(given: Mapping[str, Any], kind: type = Training) -> Filled:
    """The options given, with the defaults of the others.

    Args:
        kind: `Training`, a variant of it with other defaults, or `Solving`: what the editor's last argument unpacks.

    Raises:
        TypeError: an option that there is not.
    """
    fields = get_type_hints(kind, include_extras=True)
    if unknown := sorted(given.keys() - fields.keys()):
        raise TypeError(f"editor: got an unexpected option {unknown[0]!r}, allowed: {', '.join(fields)}")
    return {name: given.get(name, _default(annotation)) for name, annotation in fields.items()}


def _default(annotation: Any) -> Any:
    return next(part for part in annotation.__metadata__ if isinstance(part, FieldInfo)).default
