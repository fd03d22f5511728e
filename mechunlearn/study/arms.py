"""The study's arms: where each one edits, with exactly as many entries as fact lookup has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mechunlearn.components import Kind
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.localize import LOCALIZERS
from mechunlearn.masks import mask_of
from mechunlearn.models import Model, all_components
from mechunlearn.study.settings import TaskSettings

LEAST_SUBJECTS = 5  # of an answer, for the probe to hold some out


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to choose what is edited."""

    name: str
    localizer: str | None = None
    kinds: tuple[Kind, ...] = ("mlp",)
    matched: bool = True
    """Whether it edits exactly as many entries as fact lookup and `more_mlps`; else everything of its kinds."""
    more_mlps: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """The localizer's."""
    standard: bool = False
    """Whether it is also attacked at the standard level, whatever the preset says."""
    editor: str = "inject"
    editing: Mapping[str, Any] = field(default_factory=dict)
    """The editor's options, beside those of the task."""
    budget_share: float = 1.0
    """Of the task's `max_damage`."""
    slower: int = 1
    """So many times the task's steps, at learning rates that are as many times lower."""


RESISTANT, UNRESISTED, FORGET = "lookup-resistant", "lookup-unresisted", "forget"
BOTH: tuple[Kind, ...] = ("mlp", "attention")
LOOKUP, LOOKUP_PATHS = "lookup-probe", "lookup-paths"
RANDOM_MLPS, ALL_MLPS, NONLOCALIZED = "random-mlps", "all-mlps", "nonlocalized"
ARMS = (
    Arm(name=LOOKUP, localizer="fact_lookup_probe", options={"draws": 1}, standard=True),
    Arm(name=LOOKUP_PATHS, localizer="fact_lookup_paths", options={"fdr": 1.0}),  # ten heads, as the source
    Arm(name="attribution-patching", localizer="attribution_patching", kinds=BOTH),
    Arm(name="attribution-patching-mlps", localizer="attribution_patching"),
    Arm(name="causal-tracing", localizer="causal_tracing", kinds=BOTH),
    Arm(name="causal-tracing-mlps", localizer="causal_tracing"),
    Arm(name="random", localizer="random_components", kinds=BOTH),
    Arm(name=RANDOM_MLPS, localizer="random_mlps", standard=True),
    Arm(name=ALL_MLPS, matched=False),
    Arm(name=NONLOCALIZED, kinds=BOTH, matched=False, standard=True),
)  # fmt: skip
"""The paper's."""
BEYOND_ARMS = tuple(
    Arm(
        name=name, localizer="fact_lookup_probe", options={"draws": 1}, standard=True, editor="resistant_inject",
        editing=editing, more_mlps=1, budget_share=0.8, slower=2,
    )
    for name, editing in ((RESISTANT, {}), (UNRESISTED, {"resist_weight": 0.0}))
)  # fmt: skip
"""Fact lookup's MLPs and the next best, trained against an attacker; and the same without that attacker. The whole
budget would be more damage than fact lookup's edit does."""
EDITORS_COMPARED = (
    FORGET, "gradient_ascent", "gradient_difference", "npo", "simnpo", "idk_dpo", "rmu", "weight_mask", "rome",
    "memit", "alphaedit", "lookup_erasure",
)  # fmt: skip
EDITOR_ARMS = tuple(
    Arm(name=editor, localizer="fact_lookup_probe", options={"draws": 1}, editor=editor) for editor in EDITORS_COMPARED
)
"""Other ways to edit the MLPs of fact lookup; `LOOKUP` itself is `inject`, `RESISTANT` `resistant_inject`."""
EVERY_ARM = (*ARMS, *BEYOND_ARMS, *EDITOR_ARMS)
DRAWN = ("random", RANDOM_MLPS)
"""Arms that are drawn: `draw` tells draws of one seed apart."""


def arm_named(name: str) -> Arm:
    """The arm of that name, without the number of a draw."""
    return next(arm for arm in EVERY_ARM if arm.name == name.partition("#")[0])


def n_matched(model: Model, task: TaskSettings, arm: Arm) -> int:
    """Entries that a matched arm edits: those of so many MLPs (of the first ones: all are alike)."""
    return mask_of(model, all_components(model, ("mlp",))[: task.n_mlps + arm.more_mlps]).n_selected


def ranked_components(
    model: Model, split: FactSplit, arm: Arm, task: TaskSettings, *, seed: int, draw: int = 0, published: bool = False
) -> tuple[str, ...]:
    """The arm's components, as many as it takes to hold the matched number of entries.

    They are in the model's order where they hold exactly that number; else best first, and `exact_mask` cuts the last.
    Probing looks at all known facts of the forgotten
    relations, as the source does; the other localizers at the facts to forget.

    Args:
        published: take those that were published for this arm, where there are any.
    """
    everything = all_components(model, arm.kinds)
    if not arm.matched:
        return tuple(map(str, everything))
    if published and arm.name in task.components:
        return tuple(task.components[arm.name])
    method = LOCALIZERS.get(arm.localizer or "")
    facts = probed_facts(split) if arm.localizer == "fact_lookup_probe" else split.forget
    offered: dict[str, Any] = {"seed": 1000 * draw + seed} if arm.name in DRAWN else {"seed": seed}
    scores = method.function(model, facts, **arm.options, **method.wanted(**offered))
    ranking = [component for component in scores.ranking() if component.kind in arm.kinds]
    limit, chosen = n_matched(model, task, arm), list(ranking)
    for k in range(1, len(ranking) + 1):
        if (size := mask_of(model, ranking[:k]).n_selected) >= limit:
            chosen = ranking[:k] if size > limit else list(mask_of(model, ranking[:k]).components)
            break
    return tuple(map(str, chosen))


def probed_facts(split: FactSplit) -> Sequence[Fact]:
    """All facts of the forgotten relations, but for answers with too few subjects to hold some out."""
    relations = {fact.relation for fact in split.forget}
    facts = [fact for fact in (*split.forget, *split.retain_train) if fact.relation in relations]
    subjects = Counter((fact.relation, fact.target_true) for fact in facts)
    facts = [fact for fact in facts if subjects[fact.relation, fact.target_true] >= LEAST_SUBJECTS]
    answers = {relation: {f.target_true for f in facts if f.relation == relation} for relation in relations}
    return [fact for fact in facts if len(answers[fact.relation]) > 1]
