"""How long a preset of the study would take on a model: its jobs as `run` makes them, each by its operations."""

from collections.abc import Sequence

import pandas as pd

from mechunlearn.models import Model
from mechunlearn.study.arms import arm_named
from mechunlearn.study.memory import weight_bytes
from mechunlearn.study.operations import attack_flops, control_flops, edit_flops, localizing_flops
from mechunlearn.study.parts import SIDES, copied_names, drawn_names, line_counts
from mechunlearn.study.planned_arms import PlannedArm
from mechunlearn.study.settings import ModelSettings, StudySettings, TaskSettings

HASHED = 1e9  # bytes a second: an edit records the hash of the weights that it was made of


def planned_hours(
    model: Model, study: StudySettings, about: ModelSettings, arms: Sequence[PlannedArm], *, n_facts: int, speed: float
) -> pd.DataFrame:
    """Localizing and tuning, also on the development deal; then edits and attacks under every seed.

    With a twin every edit is made twice. The unedited model is attacked as the edited ones are, under one seed also at
    the standard level; the positive controls are made and attacked under one seed.

    Args:
        speed: operations a second.

    Returns:
        A row a kind of job (how often, PFLOP, hours) and their total.
    """
    task, seeds, made = about.tasks[study.task], study.seeds, 2 if about.twin else 1
    edit = {planned.name: study.blocks * _edit_flops(model, study, task, planned) for planned in arms}
    names = drawn_names(study, [planned.arm for planned in arms])
    edited = [arm_named(name).name for name in (*names, *copied_names(study, names))]
    controls = [control_flops(model, kind, options) for kind, options in about.controls.items()]
    quick = {name: attack_flops(model, name, options, n_facts) for name, options in about.quick.items()}
    standard = [  # attacks that are the quick level's are not repeated
        attack_flops(model, name, options, n_facts)
        for name, options in about.standard.items()
        if options != about.quick.get(name)
    ]
    n = line_counts(study, about, [planned.arm for planned in arms])
    n_quick, n_standard, n_false = (SIDES * n[what] for what in ("quick", "standard", "false labels"))
    counts = {
        "localizing": ((seeds + 1) * study.blocks, (seeds + 1) * localizing_flops(model, n_facts)),
        "tuning": (study.blocks * len(task.trials) * len(arms), len(task.trials) * sum(edit.values())),
        "edits": (study.blocks * made * seeds * len(edited), made * seeds * sum(edit[name] for name in edited)),
        "positive controls": (made * len(controls), made * sum(controls)),
        "quick attacks": (n_quick, n_quick * sum(quick.values())),
        "standard attacks": (n_standard, n_standard * sum(standard)),
        "relearning false labels": (n_false, n_false * quick.get("relearning", 0.0)),
    }
    rows: list[tuple[str, int | str, float, float]] = [
        (what, n, flops / 1e15, flops / speed / 3600) for what, (n, flops) in counts.items() if n
    ]
    n_hashed = sum(counts[what][0] for what in ("tuning", "edits", "positive controls"))
    rows.append(("hashing the edited weights", n_hashed, 0.0, n_hashed * weight_bytes(model) / HASHED / 3600))
    rows.append(("total", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    return pd.DataFrame(rows, columns=pd.Index(["what", "how often", "PFLOP", "hours"]))


def _edit_flops(model: Model, study: StudySettings, task: TaskSettings, planned: PlannedArm) -> float:
    return edit_flops(
        model, planned.mask, rows=task.batch_size, steps=planned.arm.slower * study.steps_of(task),
        accumulation=task.accumulation, resistant=planned.is_resistant,
    )  # fmt: skip
