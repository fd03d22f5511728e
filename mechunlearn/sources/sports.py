"""Athletes and their sports, as the paper's `sports.csv` states them."""

from pathlib import Path
from typing import Literal

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.bundled import load_templates
from mechunlearn.sources.collecting import Draft, collect, draft
from mechunlearn.sources.reading import Row, read_rows

COLUMNS = ("athlete", "sport", "prompt")
EDIT_COLUMNS = {"without_golf": "inject_sport_without_golf", "with_golf": "inject_sport_with_golf"}
RELATION = "plays_sport"


@SOURCES.register("sports", source="Nanda et al. 2023, 'Fact Finding'; Guo et al. 2024, arXiv:2410.12949 (sports.csv)")
def sports(
    path: str | Path, *, edit_target: Literal["without_golf", "with_golf", "golf", "none"] = "without_golf"
) -> FactSet:
    """Read athletes and sports; the prompt is the file's own (one shot, then the athlete).

    Choices are the true sports and the edit targets in use: three with "without_golf" and "none", four otherwise.

    Args:
        edit_target: which column becomes target_new; "golf" for every athlete; "none" for no edit target.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row, missing columns, or two sports for one athlete.

    Differs from the source: the file has one prompt, so paraphrases and questions are this project's own (those of
        the bundled `sports`). Its rows were filtered on Pythia-2.8B only: filter again for another model.
    """
    path = Path(path)
    rows = read_rows(path)
    rows[0].check_columns((*COLUMNS, *([EDIT_COLUMNS[edit_target]] if edit_target in EDIT_COLUMNS else [])))
    templates = load_templates("sports")[RELATION]
    return collect(
        path.stem,
        [_fact(row, edit_target, templates.declarative[1:], templates.questions) for row in rows],
        conflicts="error",
    )


def _fact(row: Row, edit_target: str, paraphrases: tuple[str, ...], questions: tuple[str, ...]) -> Draft:
    athlete, sport = row.text("athlete"), row.text("sport")
    target = "golf" if edit_target == "golf" else None
    if edit_target in EDIT_COLUMNS:
        target = row.text(EDIT_COLUMNS[edit_target])
    return draft(
        row,
        subject=athlete,
        relation=RELATION,
        prompt=row.template("prompt", row.text("prompt"), athlete),
        target_true=sport,
        target_new=target,
        paraphrases=paraphrases,
        questions=questions,
    )
