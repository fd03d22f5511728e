"""The study as the command line offers it: presets in, tables and figures out."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mechunlearn.experiment import n_workers
from mechunlearn.files import replaceable, whole_folder
from mechunlearn.report.study import arms_figure, claims_figure
from mechunlearn.report.study_page import study_page
from mechunlearn.study.claims import PAPERS_TASKS, beside_published, claim_table
from mechunlearn.study.parts import Part, parts_of
from mechunlearn.study.run import Progress, estimate, run_study
from mechunlearn.study.settings import load_study, study_presets
from mechunlearn.study.tables import StudyTables, study_tables

QUICK = "quick"


def chosen_parts(
    presets: Sequence[str], out: Path, *,
    model: str | None = None, seeds: int | None = None, device: str | None = None, workers: int | None = None,
) -> list[Part]:  # fmt: skip
    """The presets to run, the paper's six where none is named; what is None is as each of them says.

    Raises:
        FileNotFoundError: an unknown preset or model.
        ValueError: settings that do not fit.
    """
    loaded = [
        load_study(name, model=model, seeds=seeds, device=device, workers=workers) for name in presets or PAPERS_TASKS
    ]
    return parts_of(loaded, out)


def every_preset() -> list[str]:
    """All but the quick one, the paper's first."""
    return [*PAPERS_TASKS, *(name for name in study_presets() if name not in (QUICK, *PAPERS_TASKS))]


def planned(parts: Sequence[Part]) -> pd.DataFrame:
    """What the whole study would take from its beginning, in hours, by kind of job."""
    hours = estimate(parts, workers=workers_of(parts))
    rows = [*hours.items(), ("all", sum(hours.values()))]
    return pd.DataFrame(rows, columns=pd.Index(["jobs", "hours"]))


def workers_of(parts: Sequence[Part]) -> int:
    """Processes that run them, one pool for all: the largest number that any preset says, on CUDA one."""
    return n_workers(max(part.study.workers for part in parts), [part.study.device for part in parts])


def run(parts: Sequence[Part], out: Path, *, on_progress: Progress) -> StudyTables:
    """Run what is not done, then write the tables and figures."""
    replaceable(out / "tables")
    run_study(parts, workers=workers_of(parts), on_progress=on_progress)
    return write_tables(parts, out)


def write_tables(parts: Sequence[Part], out: Path) -> StudyTables:
    """Write out/tables: csv files and figures of the presets that are finished."""
    replaceable(out / "tables")
    found = study_tables(parts, workers=workers_of(parts))
    with whole_folder(out / "tables") as folder:
        found.save(folder)
        tables = StudyTables.load(folder)  # as it is written: figures and page can be made again from the csv files
        claims = claim_table(tables)
        claims.to_csv(folder / "claims.csv", index=False)
        beside_published(tables).to_csv(folder / "published.csv", index=False, float_format="%.4f")
        for preset in dict.fromkeys(tables.arms["preset"]):
            arms_figure(tables, preset).write_html(folder / f"{preset}.html")
        claims_figure(claims).write_html(folder / "claims.html")
        (folder / "study.md").write_text(study_page(tables, claims), encoding="utf-8")
    return tables
