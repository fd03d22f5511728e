"""The counterfact-tracing table, with the multiple-choice questions written for it."""

import ast
import re
from pathlib import Path
from typing import Literal

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.collecting import Draft, collect, draft
from mechunlearn.sources.reading import Row, read_rows

COLUMNS = ("relation", "relation_id", "subject", "target_true", "target_false")
QUESTION_COLUMNS = ("question", "target_true", "targets_false", "prompt_id")
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


@SOURCES.register(
    "counterfact_tracing",
    source="NeelNanda/counterfact-tracing; Guo et al. 2024, arXiv:2410.12949 (the csv with model probabilities)",
)
def counterfact_tracing(
    path: str | Path,
    *,
    multiple_choice: str | None = None,
    candidates: Literal["relation", "question"] = "relation",
) -> FactSet:
    """Read counterfact-tracing rows (csv or parquet); targets and subjects lose their leading space.

    Args:
        multiple_choice: a parquet file with question, target_true, targets_false, prompt_id, joined by prompt_id;
            a question is taken where its answer is the fact's and it names the subject.
        candidates: choices are the answers of the relation (at most 24), or the four options of the question. With
            "question", facts whose question does not hold both the true and the edited answer are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row, missing columns, or candidates="question" without `multiple_choice`.

    Differs from the source: options are matched by string, not by position (the first false target is the edited
        answer for about 95% of the facts only).
    """
    path = Path(path)
    if candidates == "question" and multiple_choice is None:
        raise ValueError(
            "counterfact_tracing: got candidates='question' without multiple_choice; name the parquet file"
        )
    items = _read_questions(Path(multiple_choice)) if multiple_choice is not None else {}
    rows = read_rows(path)
    if items:
        rows[0].check_columns(("prompt_id",))
    drafts = [_fact(row, items, candidates) for row in rows]
    return collect(path.stem, [item for item in drafts if item is not None], conflicts="first")


def parse_printed_array(text: str) -> tuple[str, ...]:
    """The strings of a printed numpy array: quoted, without commas between them.

    A literal parse would join neighbouring strings silently.

    Raises:
        ValueError: something other than quoted strings, brackets and commas.
    """
    if QUOTED.sub("", text).strip(" \t\r\n[],"):
        raise ValueError("a printed list of quoted strings")
    return tuple(ast.literal_eval(quoted) for quoted in QUOTED.findall(text.replace("\n", " ")))


def _fact(row: Row, items: dict[int, Row], candidates: str) -> Draft | None:
    row.check_columns(COLUMNS)
    subject, true, new = row.text("subject"), row.text("target_true"), row.text("target_false")
    item = items.get(_prompt_id(row)) if items else None
    questions, options = _question(item, subject, true)
    if candidates == "question" and new not in options:
        return None
    return draft(
        row,
        subject=subject,
        relation=row.text("relation_id"),
        prompt=row.text("relation"),
        target_true=true,
        target_new=new,
        paraphrases=tuple(
            row.template("paraphrase_prompts", text, subject) for text in _prompts(row, "paraphrase_prompts")
        ),
        questions=questions,
        neighborhood=tuple((text, true) for text in _prompts(row, "neighborhood_prompts")),
        choices=options if candidates == "question" else (),
    )


def _prompts(row: Row, field: str) -> tuple[str, ...]:
    value = row.fields.get(field)
    if not isinstance(value, str):
        return row.texts(field)
    try:
        return tuple(text.strip() for text in parse_printed_array(value))
    except (ValueError, SyntaxError):
        raise row.error(field, value, "a printed list of quoted strings") from None


def _question(item: Row | None, subject: str, true: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The question's template and its options, or neither."""
    if item is None or item.text("target_true") != true or subject not in item.text("question"):
        return (), ()
    options = tuple(dict.fromkeys((true, *item.texts("targets_false"))))
    return (item.template("question", item.text("question"), subject),), options


def _read_questions(path: Path) -> dict[int, Row]:
    rows = read_rows(path)
    for row in rows:
        row.check_columns(QUESTION_COLUMNS)
    return {_prompt_id(row): row for row in rows}


def _prompt_id(row: Row) -> int:
    value = row.fields.get("prompt_id")
    if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()):
        return int(value)
    raise row.error("prompt_id", value, "a whole number")
