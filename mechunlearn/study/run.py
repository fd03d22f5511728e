"""The whole study: locate, tune, edit and attack every arm of every preset; what is done is never done again."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mechunlearn.experiment import process_pool
from mechunlearn.files import whole_file
from mechunlearn.sources.loading import load_facts
from mechunlearn.study.arms import arm_named, n_matched, ranked_components
from mechunlearn.study.deals import dealt
from mechunlearn.study.jobs import Job, Level, carry_out, is_done
from mechunlearn.study.parts import DEVELOPMENT, SIDES, Line, Part, line_counts, lines, located_path, trials, tuned
from mechunlearn.study.settings import ModelSettings

Progress = Callable[[str, float, float], None]
SECONDS: Mapping[Level, float] = {"tune": 20.0, "quick": 35.0, "standard": 60.0}
"""Of one job on one core, before any has been measured."""


def locate(part: Part, seed: int) -> None:
    """Rank the components of every arm under one seed and write them down; block by block, on the unedited model."""
    path = located_path(part, seed)
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
        _each(pool, locate, [place for place in places if not located_path(*place).is_file()], "locating", on_progress)
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
    """Hours from the beginning, by stage, counted in jobs; arms that turn out to edit the same make it fewer."""
    home = parts[0].home
    measured = {level: _mean_seconds(home, level) for level in SECONDS}
    n: dict[Level, int] = {"tune": 0, "quick": 0, "standard": 0}
    for part in parts:
        n["tune"] += len(part.arms) * len(part.model.tasks[part.study.task].trials)
        counts = line_counts(part.study, part.model, part.arms)
        n["quick"] += SIDES * (counts["quick"] + counts["false labels"])
        n["standard"] += SIDES * counts["standard"]
    return {level: n[level] * measured[level] / workers / 3600 for level in n}


def _mean_seconds(home: Path, level: Level) -> float:
    """Of the jobs that are done, or else the usual ones."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in home.glob("[!.]*/record.json")]
    seconds = [record["seconds"] for record in records if record["level"] == level]
    return sum(seconds) / len(seconds) if seconds else SECONDS[level]
