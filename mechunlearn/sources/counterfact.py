"""CounterFact in the layout of its authors (ROME) and in that of EasyEdit."""

from pathlib import Path

from mechunlearn.facts import FactSet
from mechunlearn.sources import SOURCES
from mechunlearn.sources.collecting import Draft, collect, draft
from mechunlearn.sources.reading import Row, read_rows

ROME = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
EASYEDIT = ("prompt", "subject", "target_new", "ground_truth")


@SOURCES.register(
    "counterfact", source="Meng et al. 2022; arXiv:2202.05262 (kmeng01/rome, MIT); EasyEdit layout: zjunlp/EasyEdit"
)
def counterfact(path: str | Path) -> FactSet:
    """Read CounterFact edits; the layout is told by the first record.

    ROME: relation is the Wikidata id; neighbourhood prompts are given the fact's own true answer, which they
    share by construction. EasyEdit has no relation id, so the relation is the prompt's template
    ("The mother tongue of {} is"); one rephrased prompt and one locality prompt with its own answer.

    The data hold a few facts twice with another answer or edit target: the first is kept. Choices are the true and
    edited answers of the relation.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row (file, row, field, got, allowed), or missing columns.

    Differs from the source: `case_id` is not used, because published excerpts renumber it; `attribute_prompts` and
        `generation_prompts` are not read.
    """
    path = Path(path)
    rows = read_rows(path)
    rome = "requested_rewrite" in rows[0].fields
    for row in rows:
        row.check_columns(ROME if rome else EASYEDIT)
    return collect(path.stem, (_rome(row) if rome else _easyedit(row) for row in rows), conflicts="first")


def _rome(row: Row) -> Draft:
    rewrite = row.inner("requested_rewrite")
    subject = rewrite.text("subject")
    answer = rewrite.inner("target_true").text("str")
    return draft(
        row,
        subject=subject,
        relation=rewrite.text("relation_id"),
        prompt=rewrite.text("prompt"),
        target_true=answer,
        target_new=rewrite.inner("target_new").text("str"),
        paraphrases=tuple(
            row.template("paraphrase_prompts", text, subject) for text in row.texts("paraphrase_prompts")
        ),
        neighborhood=tuple((text, answer) for text in row.texts("neighborhood_prompts")),
    )


def _easyedit(row: Row) -> Draft:
    subject = row.text("subject")
    template = row.template("prompt", row.text("prompt"), subject)
    rephrased = row.optional_text("rephrase_prompt")
    near = row.optional_text("locality_prompt")
    return draft(
        row,
        subject=subject,
        relation=template,
        prompt=template,
        target_true=row.text("ground_truth"),
        target_new=row.text("target_new"),
        paraphrases=(row.template("rephrase_prompt", rephrased, subject),) if rephrased else (),
        neighborhood=((near, row.text("locality_ground_truth")),) if near else (),
    )
