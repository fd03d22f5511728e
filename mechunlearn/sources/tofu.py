"""TOFU: questions and answers about invented authors, as JSON Lines."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.collecting import Draft, collect, draft
from mechunlearn.sources.reading import Row, read_rows

COLUMNS = ("question", "answer")
OPTIONS = ("option1", "option2", "option3", "option4")
REACH = 19  # an author's rows stand together, 20 in a row
MIN_MENTIONS = 3
WORD = re.compile(r"[^\W_]+(?:[-'\u2019.][^\W_]+|&)*")
PARTICLES = frozenset(re.findall(r"\S+", "of the de del da di la le van von der den bin ibn al and"))
OPENERS = frozenset(  # capitalised for standing first, or dates: no names
    re.findall(
        r"\S+",
        "a an and any apart are as aside at author based being besides by can considering could describe did do does "
        "during for from given had has have how if in is may might name on other over please provide since tell that "
        "the their these this those through throughout to upon was were what what's when where where's which while "
        "who who's whom whose why with within would i lgbtq january february march april june july august september "
        "october november december",
    )
)


@SOURCES.register("tofu", source="Maini et al. 2024; arXiv:2401.06121 (locuslab/tofu, MIT)")
def tofu(path: str | Path, *, without_subject: Literal["drop", "error"] = "drop") -> FactSet:
    """Read TOFU rows; the whole answer is target_true, the prompt is ``Question: ...`` then ``Answer:`` in a new line.

    The subject is the author's name where the question holds it (a capitalised name of two words or more that
    at least 3 questions within 19 rows share), else the question's longest capitalised span. As the format
    names no relation, the question with ``{}`` for the subject is the relation. Options or perturbed answers become
    choices, the paraphrased question a paraphrase.
    Were one question to stand twice with different answers, the first is kept.

    Args:
        without_subject: a question without any capitalised span has nothing to put into ``{}``. "drop" leaves
            it out and writes the number of such rows into the fact set's name (more than half of the rows are an
            error); "error" raises and says how many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row, missing columns, or too many rows without a subject.

    Differs from the source: no chat template; the perturbed answers stand beside the plain answer, where TOFU's truth
        ratio compares them with the paraphrased one.
    """
    path = Path(path)
    rows = read_rows(path)
    for row in rows:
        row.check_columns(COLUMNS)
    subjects = find_subjects([row.text("question") for row in rows])
    bare = [row for row, subject in zip(rows, subjects, strict=True) if subject is None]
    if bare and (without_subject == "error" or 2 * len(bare) > len(rows)):
        raise bare[0].error(
            "question",
            bare[0].text("question"),
            f"a question that names its subject; {len(bare)} of {len(rows)} rows do not ('drop' takes up to half)",
        )
    drafts = [_fact(row, subject) for row, subject in zip(rows, subjects, strict=True) if subject is not None]
    name = f"{path.stem} ({len(bare)} of {len(rows)} rows without a subject left out)" if bare else path.stem
    return collect(name, drafts, conflicts="first", fill_choices=False)


def find_subjects(questions: Sequence[str]) -> tuple[str | None, ...]:
    """The subject of each question, or None; the rule is stated at `tofu`."""
    spans = [list(_spans(question)) for question in questions]
    names = [{part for span in found for part in _names(span)} for found in spans]
    subjects: list[str | None] = []
    for i, question in enumerate(questions):
        near = Counter(name for part in names[max(0, i - REACH) : i + REACH + 1] for name in part)
        held = {name: near[name] for name in names[i] if near[name] >= MIN_MENTIONS}
        often = [name for name, n in held.items() if 2 * n >= max(held.values())]
        subjects.append(max(often or spans[i], key=lambda name: (len(name), -question.find(name)), default=None))
    return tuple(subjects)


def _spans(question: str) -> Iterator[str]:
    """Runs of capitalised words (particles between them allowed), without question words at the start."""
    run: list[re.Match[str]] = []
    for word in [*WORD.finditer(question), None]:
        joined = word and run and not question[run[-1].end() : word.start()].strip(" .")
        if word and joined and (_is_capital(word) or word.group() in PARTICLES):
            run.append(word)
            continue
        if span := _trim(question, run):
            yield span
        run = [word] if word and _is_capital(word) else []


def _is_capital(word: re.Match[str]) -> bool:
    return word.group()[0].isupper()


def _trim(question: str, run: list[re.Match[str]]) -> str:
    while run and (run[0].group().lower() in OPENERS or run[0].group() in PARTICLES):
        run = run[1:]
    while run and not _is_capital(run[-1]):
        run = run[:-1]
    return re.sub(r"['\u2019]s?$", "", question[run[0].start() : run[-1].end()]) if run else ""


def _names(span: str) -> Iterator[str]:
    """Every part of a span that could be a name: at least two words, the outer ones capitalised."""
    starts = [match.start() for match in re.finditer(r"\S+", span)]
    ends = [match.end() for match in re.finditer(r"\S+", span)]
    for first, start in enumerate(starts):
        for end in ends[first + 1 :]:
            last = span[start:end].split()[-1]
            if span[start].isupper() and last[0].isupper():
                yield re.sub(r"['\u2019]s$", "", span[start:end])


def _fact(row: Row, subject: str) -> Draft:
    question = row.template("question", row.text("question"), subject)
    answer = row.text("answer")
    others = row.texts("perturbed_answer") if "perturbed_answer" in row.fields else ()
    options = tuple(row.text(name) for name in OPTIONS if name in row.fields)
    paraphrased = row.optional_text("paraphrased_question")
    return draft(
        row,
        subject=subject,
        relation=question,
        prompt=_ask(question),
        target_true=answer,
        paraphrases=(_ask(row.template("paraphrased_question", paraphrased, subject)),)
        if paraphrased and subject in paraphrased
        else (),
        questions=(question,),
        choices=options or ((answer, *others) if others else ()),
    )


def _ask(question: str) -> str:
    return f"Question: {question}\nAnswer:"
