"""Which sublayers every arm of the study would edit on a model, before anything is localized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mechunlearn.components import Component
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.masks import ParameterMask, mask_of, select_components
from mechunlearn.models import Model, all_components
from mechunlearn.random_masks import random_mask_like
from mechunlearn.registry import did_you_mean
from mechunlearn.study.arms import (
    ALL_MLPS,
    ARMS,
    BEYOND_ARMS,
    DRAWN,
    LOOKUP,
    LOOKUP_PATHS,
    NONLOCALIZED,
    RANDOM_MLPS,
    Arm,
    arm_named,
    n_matched,
)
from mechunlearn.study.memory import whole
from mechunlearn.study.settings import StudySettings, TaskName, TaskSettings

PAPERS = tuple(arm.name for arm in ARMS)
LOCALIZED = tuple(arm.name for arm in ARMS if arm.matched and arm.name not in DRAWN)
WHOLE = tuple(arm.name for arm in ARMS if not arm.matched)
BEYOND = tuple(arm.name for arm in BEYOND_ARMS)
PLANNED = (*PAPERS, *BEYOND)
LEADING: Mapping[TaskName, str] = {"athletes": LOOKUP, "sport": LOOKUP, "counterfact": LOOKUP_PATHS}
"""The paper's fact lookup: what the other arms are matched to."""

Origin = Literal["published", "assumed", "drawn", "all"]
"""assumed: the first arm's (with the next MLP, where one more is edited), or the MLPs above m0, for what a localizer
will find here is not known yet."""


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """What one arm would edit."""

    name: str
    origin: Origin
    mask: ParameterMask
    rank: int | None = None
    """Of its updates; None: every masked entry is trained."""

    @property
    def arm(self) -> Arm:
        """How it is edited."""
        return arm_named(self.name)

    @property
    def is_resistant(self) -> bool:
        """Whether its editor trains against an attacker."""
        return self.arm.editor == "resistant_inject" and self.arm.editing.get("resist_weight") != 0


def resolve_arms(model: Model, study: StudySettings, task: TaskSettings) -> list[PlannedArm]:
    """The components of the preset's arms as parameters and masks, checked against `n_mlps` MLPs.

    Arms of MLPs must have exactly as many entries. Sets with attention may exceed that by less than one sublayer, for
    the paper added sublayers until the number was reached; the random one here stays below.

    Raises:
        ValueError: an unknown arm, a component that the model does not have, or a size that does not match.
    """
    wanted = study.arms or PAPERS
    for name in (*task.components, *task.start, *task.rank):
        if name not in PLANNED:
            raise ValueError(f"unknown arm {name!r}.{did_you_mean(name, PLANNED)}")
    if others := [name for name in wanted if name not in PLANNED]:
        raise ValueError(f"arms: got {', '.join(others)}, which are not planned; allowed: {', '.join(PLANNED)}")
    if not task.n_mlps < model.n_layers:
        raise ValueError(f"n_mlps: got {task.n_mlps}, allowed: fewer than the model's {model.n_layers} layers")
    leading = LEADING[study.task]
    published = {name: _mask(model, name, given) for name, given in task.components.items()}
    first = published.get(leading) or _mask(model, leading, [f"m{n}" for n in range(1, task.n_mlps + 1)])
    masks = {name: published.get(name, first) for name in LOCALIZED}
    anything = Fact(subject="a", relation="b", prompt="{} is", target_true="c")  # random scores are alike for all facts
    scores = LOCALIZERS.get("random_components").function(model, [anything], seed=study.seed)
    masks |= {
        "random": select_components(
            scores, model, budget=first.n_selected, kinds=("mlp", "attention"), fill=True
        ),
        RANDOM_MLPS: random_mask_like(first, model, seed=study.seed),
        ALL_MLPS: mask_of(model, all_components(model, ("mlp",))),
        NONLOCALIZED: whole(model),
    }  # fmt: skip
    masks |= {
        name: published.get(name) or _with_more(model, masks[LOOKUP], arm_named(name).more_mlps) for name in BEYOND
    }
    for name in (*LOCALIZED, *DRAWN, *BEYOND):
        budget = n_matched(model, task, arm_named(name))
        _check_size(model, name, masks[name], budget, exactly=name == leading or name.endswith("-mlps"))
    return [
        PlannedArm(name=name, origin=_origin(name, published), mask=masks[name], rank=task.rank.get(name))
        for name in wanted
    ]


def short(components: Sequence[Component]) -> str:
    """Layers by kind, neighbours as a range: "a3 m2-6"."""
    said = []
    for kind in ("attention", "mlp"):
        layers = sorted(c.layer for c in components if c.kind == kind)
        starts, ends = [n for n in layers if n - 1 not in layers], [n for n in layers if n + 1 not in layers]
        runs = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        said += [f"{kind[0]}{','.join(runs)}"] if runs else []
    return " ".join(said)


def _origin(name: str, published: Mapping[str, ParameterMask]) -> Origin:
    if name in published:
        return "published"
    return "all" if name in WHOLE else "drawn" if name in DRAWN else "assumed"


def _with_more(model: Model, mask: ParameterMask, n: int) -> ParameterMask:
    """The mask and `n` more MLPs, those nearest to its last one."""
    last = max(component.layer for component in mask.components)
    free = [mlp for mlp in all_components(model, ("mlp",)) if mlp not in mask.components]
    return mask_of(model, [*mask.components, *sorted(free, key=lambda mlp: abs(mlp.layer - last))[:n]])


def _mask(model: Model, arm: str, names: Sequence[str]) -> ParameterMask:
    try:
        return mask_of(model, [Component.parse(name) for name in names])
    except ValueError as error:
        raise ValueError(f"arm {arm}: {error}") from None


def _check_size(model: Model, arm: str, mask: ParameterMask, budget: int, *, exactly: bool) -> None:
    one_a_kind = {component.kind: component for component in mask.components}.values()  # blocks are alike
    last = max(mask_of(model, [component]).n_selected for component in one_a_kind)
    if mask.n_selected != budget if exactly else mask.n_selected >= budget + last:
        allowed = f"{budget:,}, as n_mlps says" if exactly else f"less than one sublayer above {budget:,}"
        raise ValueError(f"arm {arm}: got {mask.n_selected:,} entries ({short(mask.components)}), allowed: {allowed}")
