"""A preset of the study on a model, before anything is downloaded: every mask resolved, its memory, its hours."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mechunlearn.checkpoints import bundled_models, load_model, model_folder, model_without_weights
from mechunlearn.experiment import choose_facts
from mechunlearn.models import Model
from mechunlearn.sources.bundled import BUNDLED
from mechunlearn.sources.loading import HUB_NAME
from mechunlearn.study.memory import Batch, attack_memory, training_memory, weight_bytes, whole
from mechunlearn.study.operations import attack_flops, edit_flops, localizing_flops
from mechunlearn.study.planned_arms import LEADING, PlannedArm, resolve_arms, short
from mechunlearn.study.settings import ModelSettings, StudySettings, TaskSettings

HASHED = 1e9  # bytes a second: an edit records the hash of the weights that it was made of


def dry_run(
    study: StudySettings, about: ModelSettings, *, tflops: float = 400.0, card: float = 80.0
) -> dict[str, pd.DataFrame]:
    """Resolve every arm's components to parameters, mask and size, and estimate memory and hours.

    Without weights unless the model is bundled: shapes follow from the model file's `config`, or from a folder's.

    Args:
        tflops: 10^12 operations a second that the device reaches: 400 is 40% of an H100's peak in bfloat16.
        card: GB of the device.

    Returns:
        "facts", "arms" (a row an arm), "memory" (GB; a row an arm and an attack, at its worst of quick and standard),
        "hours".

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
        "facts": facts, "arms": _arm_rows(model, arms), "memory": _memory(model, about, task, arms, card),
        "hours": _hours(model, study, about, arms, n_facts, tflops * 1e12),
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
    budget = next(arm for arm in arms if arm.name == "random-mlps").mask.n_selected
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
    model: Model, about: ModelSettings, task: TaskSettings, arms: Sequence[PlannedArm], card: float
) -> pd.DataFrame:
    batch = Batch.of(task.batch_size)
    held = {arm.name: training_memory(model, arm.mask, batch, rank=arm.rank) for arm in arms}
    for name, options in (*about.quick.items(), *about.standard.items()):
        found = attack_memory(model, name, options)
        held[name] = max(found, held.get(name, found), key=lambda gb: gb["total"])
    return pd.DataFrame([{"of": name, **gb, "fits": gb["total"] <= card} for name, gb in held.items()])


def _hours(
    model: Model, study: StudySettings, about: ModelSettings, arms: Sequence[PlannedArm], n_facts: int, speed: float
) -> pd.DataFrame:
    """Tuning once an arm; then edits, and attacks on them, under every seed, on the model and on its twin."""
    task, sides = about.tasks[study.task], 2 if about.twin else 1
    tuned = {arm.name: len(task.trials) for arm in arms}
    edited = {arm.name: study.seeds * sides * (study.draws if arm.name == "random-mlps" else 1) for arm in arms}
    edit = {
        arm.name: study.blocks * edit_flops(
            model, arm.mask, rows=task.batch_size, steps=study.steps_of(task), accumulation=task.accumulation
        )
        for arm in arms
    }  # fmt: skip
    quick, standard = (
        sum(attack_flops(model, name, options, n_facts) for name, options in attacks.items())
        for attacks in (about.quick, about.standard)
    )
    n_tuned, n_quick = sum(tuned.values()), sum(edited.values())
    n_long = sum(edited[name] for name in (LEADING[study.task], "random-mlps", "nonlocalized"))
    counts = {
        "localizing": (study.seeds * study.blocks, study.seeds * localizing_flops(model, n_facts)),
        "tuning": (study.blocks * n_tuned, sum(n * edit[name] for name, n in tuned.items())),
        "edits": (study.blocks * n_quick, sum(n * edit[name] for name, n in edited.items())),
        "quick attacks": (n_quick, n_quick * quick),
        "standard attacks": (n_long, n_long * standard),
    }
    rows: list[tuple[str, int | str, float, float]] = [
        (what, n, flops / 1e15, flops / speed / 3600) for what, (n, flops) in counts.items()
    ]
    n_edits = study.blocks * (n_tuned + n_quick)
    rows.append(("hashing the edited weights", n_edits, 0.0, n_edits * weight_bytes(model) / HASHED / 3600))
    rows.append(("total", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    return pd.DataFrame(rows, columns=pd.Index(["what", "how often", "PFLOP", "hours"]))
