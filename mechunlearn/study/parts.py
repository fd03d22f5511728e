"""A preset's parts: its arms, the jobs that tune them, and the lines that results are from."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mechunlearn.registry import did_you_mean
from mechunlearn.study.arms import ALL_MLPS, ARMS, DRAWN, EVERY_ARM, LOOKUP, NONLOCALIZED, RANDOM_MLPS, Arm, arm_named
from mechunlearn.study.jobs import Job, Level, Outcome
from mechunlearn.study.settings import ModelSettings, StudySettings
from mechunlearn.study.tuner import editor_options, score, trial_options

Located = Mapping[str, Sequence[Sequence[str]]]
"""Arm (with "#k" for the k-th draw) -> the components of each block, best first."""
DEVELOPMENT = 1000  # added to the seed: the deal that editors are tuned on
COPIED = {"random-mlps#0": LOOKUP, ALL_MLPS: NONLOCALIZED}
"""Arms that are run a second time with the options of another, which the paper gave them in place of their own."""
SIDES = 2  # of every line: the edited model, and the twin or, without one, the edited model asked for made-up facts
LEVELS: tuple[Level, ...] = ("quick", "standard")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm under one seed: its job on the model and on its null."""

    preset: str
    arm: str
    seed: int
    level: Level
    edited: Job
    null: Job


@dataclass(frozen=True, kw_only=True)
class Found:
    """A line with what its two jobs found."""

    line: Line
    edited: Outcome
    null: Outcome


@dataclass(frozen=True, kw_only=True)
class Part:
    """One preset with everything that was found out before its arms are run."""

    study: StudySettings
    model: ModelSettings
    arms: tuple[Arm, ...]
    home: Path

    @property
    def names(self) -> list[str]:
        """The arms' names, drawn ones once a draw."""
        return drawn_names(self.study, self.arms)

    @property
    def seeds(self) -> range:
        """The seeds that results are from."""
        return range(self.study.seed, self.study.seed + self.study.seeds)

    def located(self, seed: int) -> Located:
        """What `locate` wrote."""
        return _found(located_path(self, seed))["arms"]

    def n_entries(self, name: str, seed: int) -> int | None:
        """What an arm edits, if it is a matched one."""
        return _found(located_path(self, seed))["n_entries"].get(name)

    def outcome(self, job: Job) -> Outcome:
        """What a job that is done found."""
        return Outcome.load(self.home / job.digest)

    def found(self) -> list[Found]:
        """Every line, read once: many share a null, and every table asks for all of them."""
        read = cache(Outcome.load)
        return [
            Found(line=line, edited=read(self.home / line.edited.digest), null=read(self.home / line.null.digest))
            for line in lines(self, tuned(self))
        ]

    def job(self, name: str, seed: int, options: Mapping[str, Any], **more: Any) -> Job:
        """The job of an arm (or a draw of it)."""
        arm, task = arm_named(name), self.model.tasks[self.study.task]
        return Job(
            study=self.study, model=self.model, seed=seed, blocks=tuple(map(tuple, self.located(seed)[name])),
            n_entries=self.n_entries(name, seed), editor=arm.editor,
            options={**editor_options(arm, self.study, task), **options}, **more,
        )  # fmt: skip


@cache
def _found(path: Path) -> dict[str, Any]:
    """A file of `locate`, which is written once; every job of its arms asks for it."""
    return json.loads(path.read_text(encoding="utf-8"))


def drawn_names(study: StudySettings, arms: Sequence[Arm]) -> list[str]:
    """The arms' names, drawn ones once a draw: random MLPs `study.draws` times, random sublayers once."""
    draws = {RANDOM_MLPS: study.draws}
    return [f"{arm.name}#{k}" if arm.name in DRAWN else arm.name for arm in arms for k in range(draws.get(arm.name, 1))]


def copied_names(study: StudySettings, names: Sequence[str]) -> list[str]:
    """Those of the names that are edited a second time, with the options of another arm; see `COPIED`."""
    if "copied options" not in study.defects:
        return []
    return [name for name, other in COPIED.items() if name in names and other in names]


def is_standard(study: StudySettings, arm: Arm) -> bool:
    """Whether an arm is also attacked at the standard level."""
    return arm.standard or arm.name in study.standard_arms


def line_counts(study: StudySettings, model: ModelSettings, arms: Sequence[Arm]) -> dict[Level | str, int]:
    """How many lines `lines` makes: quick, standard, and (with the quick ones, not among them) "false labels"."""
    names = drawn_names(study, arms)
    return {
        "quick": study.seeds * (1 + len(names) + len(copied_names(study, names))) + len(model.controls),
        "standard": study.seeds * sum(is_standard(study, arm) for arm in arms) + 1 + len(model.controls),
        "false labels": study.seeds * ("false labels" in study.defects),
    }


def located_path(part: Part, seed: int) -> Path:
    """Named by everything that decides where the arms edit."""
    study, model = part.study, part.model
    task = model.tasks[study.task]
    data = [
        study.task, study.n, study.blocks, study.published_components, part.names, model.model, model.twin, model.dtype,
        task.facts.model_dump(), task.target, task.n_mlps, task.components, version("mechunlearn"),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    return part.home / "located" / f"{study.name}-{digest}-{seed}.json"


def trials(part: Part) -> dict[str, list[tuple[dict[str, Any], Job]]]:
    """Of every arm the options that the tuner tries, the same for all, and their jobs on the development deal."""
    seed = part.study.seed + DEVELOPMENT
    task = part.model.tasks[part.study.task]
    tried: dict[str, list[tuple[dict[str, Any], Job]]] = {}
    for arm in part.arms:
        name = f"{arm.name}#0" if arm.name in DRAWN else arm.name
        tried[arm.name] = [
            (options, part.job(name, seed, options, level="tune")) for options in trial_options(arm, task)
        ]
    return tried


def tuned(part: Part) -> dict[str, dict[str, Any]]:
    """Of every arm the options with the best score; the first of equals."""
    best: dict[str, dict[str, Any]] = {}
    for arm, tried in trials(part).items():
        scores = [score(arm_named(arm), part.outcome(job).record["score"]) for _, job in tried]
        best[arm] = tried[scores.index(max(scores))][0]
    return best


def lines(part: Part, best: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """Every arm under every seed: the unedited model, the positive controls, and the edits."""
    study = part.study
    null = "twin" if part.model.twin else "made-up"
    found: list[Line] = []

    def add(name: str, seed: int, level: Level, job: Job) -> None:
        null_job = replace(job, on=null)
        found.append(Line(preset=study.name, arm=name, seed=seed, level=level, edited=job, null=null_job))

    for seed in part.seeds:
        for level in LEVELS:
            plain = Job(study=study, model=part.model, seed=seed, level=level)
            if level == "quick" or seed == study.seed:
                add("original", seed, level, plain)
            if seed == study.seed:
                for kind, options in part.model.controls.items():
                    add(f"suppressed-{kind}", seed, level, replace(plain, suppression=kind, options=options))
        for name in part.names:
            arm = arm_named(name)
            add(name, seed, "quick", part.job(name, seed, best[arm.name]))
            if is_standard(study, arm) and name.partition("#")[2] in ("", "0"):
                add(name, seed, "standard", part.job(name, seed, best[arm.name], level="standard"))
        for name in copied_names(study, part.names):
            other = COPIED[name]
            add(f"{arm_named(name).name}, tuned as {other}", seed, "quick", part.job(name, seed, best[other]))
        if "false labels" in study.defects:
            add(f"{LOOKUP}, false labels", seed, "quick", part.job(LOOKUP, seed, best[LOOKUP], false_labels=True))
    return found


def parts_of(presets: Iterable[tuple[StudySettings, ModelSettings]], home: Path) -> list[Part]:
    """The presets, ready to run in one folder.

    Raises:
        ValueError: an unknown arm, a standard one that is not run, or arms without fact lookup, which the others are
            compared with.
    """
    parts: list[Part] = []
    for study, model in presets:
        if study.name in (part.study.name for part in parts):
            raise ValueError(f"study {study.name}: got two presets of this name; give one of them another")
        names = study.arms or [arm.name for arm in ARMS]
        for name in names:
            if name not in (known := [arm.name for arm in EVERY_ARM]):
                raise ValueError(f"study {study.name}: unknown arm {name!r}.{did_you_mean(name, known)}")
        if stray := [name for name in study.standard_arms if name not in names]:
            raise ValueError(
                f"study {study.name}: key 'standard_arms': got {stray[0]!r}, allowed: its arms, {', '.join(names)}"
            )
        if "false labels" in study.defects and not all("relearning" in a for a in (model.quick, model.standard)):
            raise ValueError(
                f"study {study.name}: got the defect 'false labels', which needs relearning in {model.name}"
            )
        if LOOKUP not in names:
            raise ValueError(f"study {study.name}: got arms {', '.join(names)}, which need {LOOKUP} to compare with")
        arms = tuple(arm for arm in EVERY_ARM if arm.name in names)
        parts.append(Part(study=study, model=model, arms=arms, home=home / "jobs"))
    return parts
