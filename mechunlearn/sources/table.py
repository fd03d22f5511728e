"""A table of one's own: csv or JSON with a row a fact."""

import difflib
import json
from pathlib import Path

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.collecting import Draft, collect, draft
from mechunlearn.sources.reading import Row, read_rows

REQUIRED = ("subject", "relation", "prompt", "target_true")
OPTIONAL = ("target_new", "paraphrases", "choices", "questions")


@SOURCES.register("table", source="mechunlearn's own format")
def table(path: str | Path) -> FactSet:
    """Read one's own facts from csv, tsv, JSON, JSON Lines or parquet.

    Columns subject, relation, prompt, target_true are required; target_new, paraphrases, choices and questions
    are optional, others are ignored. Templates hold the subject as one ``{}``. Lists are JSON lists, or
    texts separated by ``|``. Facts without choices get the answers of their relation, at most 24.

    Raises:
        FileNotFoundError: no such file.
        ValueError: missing columns, a column whose name is nearly an optional one, a malformed row, or two
            different rows for one subject and relation (put other wordings into paraphrases).
    """
    path = Path(path)
    rows = read_rows(path)
    for row in rows:
        row.check_columns(REQUIRED)
    _check_spelling(rows[0])
    return collect(path.stem, [_fact(row) for row in rows], conflicts="error")


def _fact(row: Row) -> Draft:
    return draft(
        row,
        subject=row.text("subject"),
        relation=row.text("relation"),
        prompt=row.text("prompt"),
        target_true=row.text("target_true"),
        target_new=row.optional_text("target_new"),
        paraphrases=_texts(row, "paraphrases"),
        choices=_texts(row, "choices"),
        questions=_texts(row, "questions"),
    )


def _texts(row: Row, field: str) -> tuple[str, ...]:
    value = row.fields.get(field)
    if not isinstance(value, str):
        return row.texts(field)
    if not value.strip():
        return ()
    if not value.lstrip().startswith("["):
        return tuple(part.strip() for part in value.split("|") if part.strip())
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        raise row.error(field, value, "a JSON list of texts, or texts separated by |") from None
    return Row(path=row.path, number=row.number, fields={field: parsed}).texts(field)


def _check_spelling(row: Row) -> None:
    for name in row.fields:
        close = difflib.get_close_matches(name, OPTIONAL, n=1, cutoff=0.8)
        if close and name not in OPTIONAL and close[0] not in row.fields:
            raise ValueError(
                f"{row.path}: got a column {name!r}. Did you mean {close[0]!r}? "
                f"Known: {', '.join((*REQUIRED, *OPTIONAL))}"
            )
