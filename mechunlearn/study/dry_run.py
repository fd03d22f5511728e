"""A preset of the study on a model, before anything is downloaded: every mask resolved, its memory, its hours."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mechunlearn.checkpoints import bundled_models, load_model, model_folder, model_without_weights
from mechunlearn.experiment import choose_facts
from mechunlearn.models import Model
from mechunlearn.sources.bundled import BUNDLED
from mechunlearn.sources.loading import HUB_NAME
from mechunlearn.study.memory import Batch, attack_memory, control_memory, resistant_memory, training_memory, whole
from mechunlearn.study.planned_arms import LOCALIZED, PlannedArm, resolve_arms, short
from mechunlearn.study.planned_hours import planned_hours
from mechunlearn.study.settings import ModelSettings, StudySettings, TaskSettings


def dry_run(
    study: StudySettings, about: ModelSettings, *, tflops: float = 400.0, card: float = 80.0
) -> dict[str, pd.DataFrame]:
    """Resolve the components of every arm of a preset to parameters, mask and size, and estimate memory and hours.

    Without weights unless the model is bundled: shapes follow from the model file's `config`, or from a folder's.

    Args:
        tflops: 10^12 operations a second that the device reaches: 400 is 40% of an H100's peak in bfloat16.
        card: GB of the device.

    Returns:
        "facts", "arms" (a row an arm), "memory" (GB; a row an arm, a positive control, and an attack, at its worst of
        quick and standard), "hours".

    Raises:
        ValueError: an unknown arm, a component that the model does not have, a matched arm of another size, or facts
            that are not there; one line.
    """
    if tflops <= 0 or card <= 0:
        raise ValueError(f"study plan: got {tflops:g} TFLOP/s and {card:g} GB, allowed: both above 0")
    task = about.tasks[study.task]
    model = _model(about)
    try:
        n_facts, facts = _facts(study, task)
        arms = resolve_arms(model, study, task)
    except ValueError as error:
        raise ValueError(f"{about.name}, task {study.task}: {error}") from None
    return {
        "facts": facts, "arms": _arm_rows(model, arms), "memory": _memory(model, study, about, arms, card),
        "hours": planned_hours(model, study, about, arms, n_facts=n_facts, speed=tflops * 1e12),
    }  # fmt: skip


def _model(about: ModelSettings) -> Model:
    if about.model in bundled_models():
        return load_model(about.model, device="cpu", dtype=about.dtype)
    folder = model_folder(about.model)
    if about.config is None and folder is None:
        raise ValueError(f"{about.name}: {about.model} is not here; give `config`, its Hugging Face configuration")
    return model_without_weights(about.config or Path(str(folder)) / "config.json", dtype=about.dtype)


def _facts(study: StudySettings, task: TaskSettings) -> tuple[int, pd.DataFrame]:
    """How many facts are to be forgotten; those that are here are chosen and looked at."""
    settings = task.facts.model_copy(update={"n": study.n or task.facts.n})
    name, there, relations = settings.forget or settings.source, "read when it runs", ""
    if settings.forget or settings.source in BUNDLED or Path(settings.source).exists():
        facts, forget = choose_facts(settings, seed=study.seed)
        if odd := [fact for fact in forget if task.target is not None and task.target not in fact.choices]:
            allowed = ", ".join(odd[0].choices) or "none"
            raise ValueError(f"target: got {task.target!r}, allowed for {odd[0].subject}: {allowed}")
        n, there, relations = len(forget), str(len(facts)), str(len({fact.relation for fact in forget}))
    elif not HUB_NAME.fullmatch(name):
        raise ValueError(f"facts: got {name!r}, allowed: a bundled data set, a file, or owner/name on the hub")
    elif settings.n is None:
        raise ValueError(f"{name} is not here to be counted; give the preset an n")
    else:
        n = settings.n
    row = {"facts": name, "all": there, "to forget": n, "of relations": relations, "blocks": study.blocks,
           "wrong answer": task.target or "drawn"}  # fmt: skip
    return n, pd.DataFrame([row])


def _arm_rows(model: Model, arms: Sequence[PlannedArm]) -> pd.DataFrame:
    budget = next(arm for arm in arms if arm.name in LOCALIZED).mask.n_selected
    rows = [
        {
            "arm": arm.name, "components": short(arm.mask.components), "origin": arm.origin,
            "matrices": sum(len(shape) == 2 for shape in arm.mask.shapes.values()),
            "parameters": arm.mask.n_selected, "share": arm.mask.n_selected / whole(model).n_selected,
            "of the budget": arm.mask.n_selected / budget, "rank": arm.rank or "full",
        }
        for arm in arms
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _memory(
    model: Model, study: StudySettings, about: ModelSettings, arms: Sequence[PlannedArm], card: float
) -> pd.DataFrame:
    task = about.tasks[study.task]

    def needed(planned: PlannedArm) -> dict[str, float]:
        mask, rank = planned.mask, planned.rank
        if planned.is_resistant:
            return resistant_memory(model, mask, task.batch_size, rank=rank, attack_rank=task.attack_rank)
        passes = study.steps_of(task) * task.accumulation
        return training_memory(model, mask, Batch.of(task.batch_size), passes=passes, rank=rank)

    held = {planned.name: needed(planned) for planned in arms}
    held |= {f"suppressed-{kind}": control_memory(model, kind, options) for kind, options in about.controls.items()}
    for name, options in (*about.quick.items(), *about.standard.items()):
        found = attack_memory(model, name, options)
        held[name] = max(found, held.get(name, found), key=lambda gb: gb["total"])
    return pd.DataFrame([{"of": name, **gb, "fits": gb["total"] <= card} for name, gb in held.items()])
