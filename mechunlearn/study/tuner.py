"""What the tuner tries for an arm: as many trials for every arm, each by what its editor is tuned with."""

import math
from collections.abc import Mapping
from typing import Any

from mechunlearn.edit import EDITORS
from mechunlearn.study.arms import Arm
from mechunlearn.study.settings import StudySettings, TaskSettings

Options = dict[str, Any]
OWN_TRIALS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "alphaedit": ("null_share", (0.1, 0.03, 0.3, 0.6)),
    "lookup_erasure": ("keep_weight", (5.0, 1.25, 2.5, 10.0)),
    "memit": ("covariance_weight", (1.5, 6.0, 0.4, 0.1)),
    "rome": ("clamp_norm", (0.75, 0.4, 1.5, 3.0)),
    "weight_mask": ("n_pruned", (0.05, 0.02, 0.1, 0.2)),
}
"""Editor -> what is tuned in place of the learning rate and the weight of its own term."""
WEIGHTS = ("inject_weight", "forget_weight")
TEACHING = ("inject", "resistant_inject", "memit", "alphaedit", "rome", "weight_mask")
"""Editors that are to give the wrong answer; the others only take the true one away."""


def editor_options(arm: Arm, study: StudySettings, task: TaskSettings) -> Options:
    """The options of an arm's editor that are not tuned: the task's budget and, for what is trained, its steps."""
    known = EDITORS.get(arm.editor).options.model_fields
    options: Options = {"max_damage": arm.budget_share * task.max_damage}
    if "accumulation" in known:
        options = {
            "steps": arm.slower * study.steps_of(task), "batch_size": task.batch_size,
            "accumulation": task.accumulation, **options, "rank": task.rank.get(arm.name),
        }  # fmt: skip
    if "attack_rank" in known:
        options["attack_rank"] = task.attack_rank
    return {**options, **arm.editing}


def trial_options(arm: Arm, task: TaskSettings) -> list[Options]:
    """What is tried for an arm: the task's learning rates and weights, or in their place the editor's own values."""
    if arm.editor in OWN_TRIALS:
        name, values = OWN_TRIALS[arm.editor]
        return [{name: values[i % len(values)]} for i in range(len(task.trials))]
    (weight,) = (name for name in WEIGHTS if name in EDITORS.get(arm.editor).options.model_fields)
    return [{"learning_rate": rate / arm.slower, weight: value} for rate, value in task.trials]


def score(arm: Arm, found: Mapping[str, float]) -> float:
    """How good a trial is, from `jobs.tuning_score`: without P(wrong answer) where the editor teaches none.

    One that diverged found nothing, and is worse than all others.
    """
    if not found:
        return -math.inf
    return found["score"] if arm.editor in TEACHING else found["maintain"] - found["forget"]
