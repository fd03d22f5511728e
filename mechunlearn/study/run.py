"""The whole study: locate, tune, edit and attack every arm of every preset; what is done is never done again."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mechunlearn.experiment import process_pool
from mechunlearn.files import whole_file
from mechunlearn.registry import did_you_mean
from mechunlearn.sources.loading import load_facts
from mechunlearn.study.arms import (
    ALL_MLPS,
    ARMS,
    DRAWN,
    EDITOR_ARMS,
    LOOKUP,
    NONLOCALIZED,
    Arm,
    arm_named,
    n_matched,
    ranked_components,
)
from mechunlearn.study.deals import dealt
from mechunlearn.study.jobs import Job, Level, Outcome, carry_out, is_done
from mechunlearn.study.settings import ModelSettings, StudySettings
from mechunlearn.study.tuner import editor_options, score, trial_options

Located = Mapping[str, Sequence[Sequence[str]]]
"""Arm (with "#k" for the k-th draw) -> the components of each block, best first."""
Progress = Callable[[str, float, float], None]
DEVELOPMENT = 1000  # added to the seed: the deal that editors are tuned on
COPIED = {"random-mlps#0": LOOKUP, ALL_MLPS: NONLOCALIZED}
"""Arms that are run a second time with the options of another, which the paper gave them in place of their own."""
LEVELS: tuple[Level, ...] = ("quick", "standard")
SECONDS: Mapping[Level, float] = {"tune": 15.0, "quick": 28.0, "standard": 40.0}
"""Of one job on one core, before any has been measured."""


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
class Part:
    """One preset with everything that was found out before its arms are run."""

    study: StudySettings
    model: ModelSettings
    arms: tuple[Arm, ...]
    home: Path

    @property
    def names(self) -> list[str]:
        """The arms' names, drawn ones once a draw."""
        drawn = {arm.name: [f"{arm.name}#{k}" for k in range(self.study.draws)] for arm in self.arms}
        drawn |= {"random": ["random#0"]}
        return [name for arm in self.arms for name in (drawn[arm.name] if arm.name in DRAWN else [arm.name])]

    @property
    def seeds(self) -> range:
        """The seeds that results are from."""
        return range(self.study.seed, self.study.seed + self.study.seeds)

    def located(self, seed: int) -> Located:
        """What `locate` wrote."""
        return json.loads(_located_path(self, seed).read_text(encoding="utf-8"))["arms"]

    def n_entries(self, name: str, seed: int) -> int | None:
        """What an arm edits, if it is a matched one."""
        return json.loads(_located_path(self, seed).read_text(encoding="utf-8"))["n_entries"].get(name)

    def job(self, name: str, seed: int, options: Mapping[str, Any], **more: Any) -> Job:
        """The job of an arm (or a draw of it)."""
        arm, task = arm_named(name), self.model.tasks[self.study.task]
        return Job(
            study=self.study, model=self.model, seed=seed, blocks=tuple(map(tuple, self.located(seed)[name])),
            n_entries=self.n_entries(name, seed), editor=arm.editor,
            options={**editor_options(arm, self.study, task), **options}, **more,
        )  # fmt: skip


def _located_path(part: Part, seed: int) -> Path:
    study = part.study
    data = [study.task, study.n, study.blocks, study.draws, study.published_components, part.names, part.model.name]
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:8]
    return part.home / "located" / f"{study.name}-{digest}-{seed}.json"


def locate(part: Part, seed: int) -> str:
    """Rank the components of every arm under one seed and write them down; block by block, on the unedited model."""
    path = _located_path(part, seed)
    if not path.is_file():
        task = part.model.tasks[part.study.task]
        deal = dealt(part.study.model_dump_json(), part.model.model_dump_json(), seed)
        arms = {
            name: [
                ranked_components(
                    deal.model, split, arm_named(name), task, seed=seed, draw=int(name.partition("#")[2] or 0),
                    published=part.study.published_components,
                )
                for split in deal.blocks
            ]
            for name in part.names
        }  # fmt: skip
        n_entries = {name: n_matched(deal.model, task, arm) for name in part.names if (arm := arm_named(name)).matched}
        found = {"n_entries": n_entries, "arms": arms}
        with whole_file(path) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return str(path)


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
        scores = [score(arm_named(arm), Outcome.load(part.home / job.digest).record["score"]) for _, job in tried]
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
            if arm.standard and name.partition("#")[2] in ("", "0"):
                add(name, seed, "standard", part.job(name, seed, best[arm.name], level="standard"))
        for name, other in COPIED.items() if "copied options" in study.defects else ():
            if name in part.names and other in part.names:
                add(f"{arm_named(name).name}, tuned as {other}", seed, "quick", part.job(name, seed, best[other]))
        if "false labels" in study.defects:
            add(f"{LOOKUP}, false labels", seed, "quick", part.job(LOOKUP, seed, best[LOOKUP], false_labels=True))
    return found


def parts_of(presets: Iterable[tuple[StudySettings, ModelSettings]], home: Path) -> list[Part]:
    """The presets, ready to run in one folder.

    Raises:
        ValueError: an unknown arm, or arms without fact lookup, which the others are compared with.
    """
    parts: list[Part] = []
    for study, model in presets:
        names, every = study.arms or [arm.name for arm in ARMS], (*ARMS, *EDITOR_ARMS)
        for name in names:
            if name not in (known := [arm.name for arm in every]):
                raise ValueError(f"study {study.name}: unknown arm {name!r}.{did_you_mean(name, known)}")
        if LOOKUP not in names:
            raise ValueError(f"study {study.name}: got arms {', '.join(names)}, which need {LOOKUP} to compare with")
        arms = tuple(arm for arm in every if arm.name in names)
        parts.append(Part(study=study, model=model, arms=arms, home=home / "jobs"))
    return parts


def run_study(
    parts: Sequence[Part], *, workers: int, on_progress: Progress = lambda text, done, total: None
) -> list[Line]:
    """Run what is not done yet, and return every line; a run that was killed goes on where it stopped.

    Raises:
        FileNotFoundError: facts for side effects that are not there.
        ValueError: settings that cannot be carried out.
    """
    for part in parts:  # what is missing must not be noticed after hours
        check_evaluations(part.model)
    with process_pool(workers) as pool:
        places = [(part, seed) for part in parts for seed in (*part.seeds, part.study.seed + DEVELOPMENT)]
        _each(pool, locate, [place for place in places if not _located_path(*place).is_file()], "locating", on_progress)
        home = parts[0].home
        tuning = [job for part in parts for tried in trials(part).values() for _, job in tried]
        _carry_out(pool, tuning, home, "tuning", on_progress)
        found = [line for part in parts for line in lines(part, tuned(part))]
        jobs = [job for line in found for job in (line.edited, line.null)]
        _carry_out(pool, jobs, home, "editing and attacking", on_progress)
    return found


def check_evaluations(model: ModelSettings) -> None:
    """Raise if what the model's file measures side effects with is not here, or capability without lm-eval."""
    for name, format in model.side_effects.items():
        load_facts(name, format=format)
    if model.capability and find_spec("lm_eval") is None:
        raise ValueError(
            f"model {model.name}: capability needs lm-eval; pip install 'mechunlearn[lm-eval]', or take the line out"
        )


def _carry_out(pool: Executor | None, jobs: Sequence[Job], home: Path, what: str, on_progress: Progress) -> None:
    """Each job once, whoever asks for it; those on one edited model together."""
    together: dict[str, dict[str, Job]] = {}
    for job in jobs:
        if not is_done(job, home):
            together.setdefault(job.edit_digest, {})[job.digest] = job
    _each(pool, carry_out, [(list(group.values()), home) for group in together.values()], what, on_progress)


def _each(
    pool: Executor | None,
    function: Callable[..., object],
    arguments: Sequence[tuple[Any, ...]],
    what: str,
    on_progress: Progress,
) -> None:
    """Call the function on all arguments, in the pool if there is one."""
    on_progress(what, 0, len(arguments))
    if pool is None:
        for i, given in enumerate(arguments):
            function(*given)
            on_progress(what, i + 1, len(arguments))
        return
    for i, done in enumerate(as_completed([pool.submit(function, *given) for given in arguments])):
        done.result()
        on_progress(what, i + 1, len(arguments))


def estimate(parts: Sequence[Part], *, workers: int) -> dict[str, float]:
    """Hours that are left, by stage, counted in jobs; arms that turn out to edit the same make it fewer."""
    home = parts[0].home
    measured = {level: _mean_seconds(home, level) for level in SECONDS}
    n: dict[Level, int] = {"tune": 0, "quick": 0, "standard": 0}
    for part in parts:
        n_seeds, names = len(part.seeds), len(part.names)
        n["tune"] += len(part.arms) * len(part.model.tasks[part.study.task].trials)
        n_controls, defects = len(part.model.controls), part.study.defects
        shown = len(COPIED) * ("copied options" in defects) + ("false labels" in defects)
        n["quick"] += 2 * (n_seeds * (names + 1 + shown) + n_controls)
        n["standard"] += 2 * (n_seeds * sum(arm.standard for arm in part.arms) + 1 + n_controls)
    return {level: n[level] * measured[level] / workers / 3600 for level in n}


def _mean_seconds(home: Path, level: Level) -> float:
    """Of the jobs that are done, or else the usual ones."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in home.glob("*/record.json")]
    seconds = [record["seconds"] for record in records if record["level"] == level]
    return sum(seconds) / len(seconds) if seconds else SECONDS[level]
