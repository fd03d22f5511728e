"""What one seed of a preset works on: models, split, targets, neighbors, and facts from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mechunlearn.cells import loaded
from mechunlearn.experiment import check_candidates, prepare
from mechunlearn.facts import Fact, FactSplit, balanced_sample
from mechunlearn.metrics import known_facts
from mechunlearn.models import Model
from mechunlearn.prompts import render
from mechunlearn.settings import check_settings
from mechunlearn.sources.bundled import BUNDLED, load_bundled
from mechunlearn.sources.loading import load_facts
from mechunlearn.study.settings import ModelSettings, StudySettings

N_NEIGHBORS = 4
N_ELSEWHERE = 48
FORGET_PARTS = ("forget_shown", "attack_dev", "forget_hidden")


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal:
    """The models and facts of one seed."""

    model: Model
    twin: Model | None
    split: FactSplit
    """Facts to forget with their wrong answers and, where there are any, neighbors from `retain_test`."""
    blocks: tuple[FactSplit, ...]
    """One a block: its own facts to forget; those of other blocks in no part."""
    elsewhere: tuple[Fact, ...]
    """Known facts that the task has nothing to do with: side effects show there."""


@lru_cache(maxsize=4)
def dealt(study_json: str, model_json: str, seed: int) -> Deal:
    """Load and deal; kept for the next jobs of the same preset and seed. Settings come as JSON, which hashes.

    Raises:
        ValueError: facts or models that do not suit, see `experiment.prepare` and `check_candidates`.
    """
    study, model = StudySettings.model_validate_json(study_json), ModelSettings.model_validate_json(model_json)
    task = model.tasks[study.task]
    facts = task.facts.model_dump() | ({"n": study.n} if study.n else {})
    data = {"name": study.name, "model": model.model, "dtype": model.dtype, "device": study.device, "seed": seed,
            "facts": facts} | ({"twin": model.twin} if model.twin else {})  # fmt: skip
    stage = prepare(check_settings(data, f"study {study.name}"), load=loaded)
    split = _with_neighbors(_with_target(stage.split, task.target))
    check_candidates(split.forget)
    blocks = tuple(_block(split, i, study.blocks) for i in range(study.blocks)) if study.blocks > 1 else (split,)
    return Deal(
        model=stage.model, twin=stage.twin, split=split, blocks=blocks,
        elsewhere=_elsewhere(stage.model, {fact.relation for fact in stage.facts}, model.side_effects),
    )  # fmt: skip


def _with_target(split: FactSplit, target: str | None) -> FactSplit:
    if target is None:
        return split
    parts = {part: tuple(replace(fact, target_new=target) for fact in getattr(split, part)) for part in FORGET_PARTS}
    return replace(split, **parts)


def _with_neighbors(split: FactSplit) -> FactSplit:
    """Facts without neighbors of their own get kept facts of the same relation, those of the same answer first."""
    parts = {}
    for part in FORGET_PARTS:
        facts: list[Fact] = []
        for fact in getattr(split, part):
            near = [other for other in split.retain_test if other.relation == fact.relation]
            near.sort(key=lambda other, own=fact: other.target_true != own.target_true)
            pairs = tuple((render(other, "prompt"), other.target_true) for other in near[:N_NEIGHBORS])
            facts.append(fact if fact.neighborhood else replace(fact, neighborhood=pairs))
        parts[part] = tuple(facts)
    return replace(split, **parts)


def _block(split: FactSplit, index: int, n: int) -> FactSplit:
    """Every n-th fact of each part; what is kept stays as it is."""
    return replace(split, **{part: getattr(split, part)[index::n] for part in FORGET_PARTS})


def _elsewhere(model: Model, relations: set[str], side_effects: Mapping[str, str]) -> tuple[Fact, ...]:
    """Of each data set that shares no relation with the task, facts that the model knows; all known trivia."""
    found: list[Fact] = []
    for name in BUNDLED:
        facts = load_bundled(name)
        if not relations & set(facts.relations):
            sample: Sequence[Fact] = balanced_sample(facts, min(2 * N_ELSEWHERE, len({f.subject for f in facts})))
            found += known_facts(model, sample)[:N_ELSEWHERE]
    for name, format in side_effects.items():
        found += known_facts(model, load_facts(name, format=format))
    return tuple(found)
