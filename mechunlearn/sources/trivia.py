"""Questions about a field as a whole, which an edit of single facts should leave alone."""

from pathlib import Path

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.collecting import collect, draft
from mechunlearn.sources.reading import read_rows

COLUMNS = ("question", "answer")
CLUES = "sport"


@SOURCES.register(
    "trivia", source="Guo et al. 2024, arXiv:2410.12949 (side_effect_sport_trivia.json, ..._answers.json)"
)
def trivia(path: str | Path) -> FactSet:
    """Read sports trivia; the whole question is the subject, asked as ``Question: {}`` with ``Answer:`` in a new line.

    With a column `sport` it is the relation, so that candidates are other answers about the same sport, at most 24;
    without one (the file whose answers are sports) the relation is "sport" and the candidates are the file's answers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row, missing columns, or two answers to one question about one sport.

    Differs from the source: the files have no candidates; those above are this project's own.
    """
    path = Path(path)
    drafts = []
    for row in read_rows(path):
        row.check_columns(COLUMNS)
        drafts.append(
            draft(
                row, subject=row.text("question"), relation=row.optional_text("sport") or CLUES,
                prompt="Question: {}\nAnswer:", target_true=row.text("answer"), questions=("{}",),
            )
        )  # fmt: skip
    return collect(path.stem, drafts, conflicts="error")
