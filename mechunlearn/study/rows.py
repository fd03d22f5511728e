"""Finished jobs as long rows: one a (preset, arm, draw, seed, level, fact, measure)."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from mechunlearn.attack.results import fact_id
from mechunlearn.evaluate.capability import CAPABILITY
from mechunlearn.study.deals import FORGET_PARTS
from mechunlearn.study.jobs import Outcome
from mechunlearn.study.parts import Found

# pandas has no complete types
# pyright: standard

EVALUATED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "forget": (FORGET_PARTS, "prompt", "p_true"),
    "edit": (FORGET_PARTS, "prompt", "p_new"),
    "paraphrase, forget": (FORGET_PARTS, "paraphrase", "p_true"),
    "paraphrase, edit": (FORGET_PARTS, "paraphrase", "p_new"),
    "question, forget": (FORGET_PARTS, "question", "p_true"),
    "question, edit": (FORGET_PARTS, "question", "p_new"),
    "multiple choice, forget": (FORGET_PARTS, "choice", "p_true"),
    "multiple choice, edit": (FORGET_PARTS, "choice", "p_new"),
    "maintain": (("retain_test",), "prompt", "p_true"),
    "multiple choice, maintain": (("retain_test",), "choice", "p_true"),
    "maintain, flipped": (("retain_test",), "prompt", "p_new"),
    "multiple choice, flipped": (("retain_test",), "choice", "p_new"),
    "neighborhood": (FORGET_PARTS, "neighbor", "neighborhood"),
    "same subject": (("same_subject",), "prompt", "p_true"),
    "elsewhere": (("elsewhere",), "prompt", "p_true"),
}
"""Measure -> (parts, form, metric) of the evaluation; a fact's forms of one kind are averaged."""
OF_TEXT = {"perplexity ratio": ("text", "perplexity_ratio"), "KL": ("retain_test", "kl")}
COLUMNS = ("preset", "arm", "draw", "seed", "level", "fact", "measure", "value")


def study_rows(all_found: Sequence[Found]) -> pd.DataFrame:
    """Everything that was measured, see `EVALUATED`; and three measures of each attack on the hidden facts.

    "relearning": P(true | candidates) after it; "relearning, null": the same on the equally edited and attacked null;
    "relearning, excess": the difference, which is what came back, fact by fact (not with a null of made-up facts).
    "healthy" is 1 where the attack was, on both sides.
    """
    rows: list[tuple[Any, ...]] = []
    for found in all_found:
        line = found.line
        name, _, draw = line.arm.partition("#")
        head = (line.preset, name, int(draw or 0), line.seed, line.level)
        if line.level == "quick":
            rows += [(*head, *row) for row in _evaluated(found.edited)]
        rows += [(*head, *row) for row in _attacked(found.edited, found.null, paired=line.null.on == "twin")]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def _evaluated(outcome: Outcome) -> Iterator[tuple[str, str, float]]:
    """(fact, measure, value); what is about no single fact has the fact ""."""
    if outcome.evaluation is None:
        return
    rows = outcome.evaluation.rows
    kinds = rows["form"].str.partition(":")[0]
    for measure, (parts, form, metric) in EVALUATED.items():
        chosen = rows.loc[rows["part"].isin(parts) & (kinds == form) & (rows["metric"] == metric)]
        for key, values in chosen.groupby(["subject", "relation", "answer"], sort=False)["value"]:
            yield fact_id(*key), measure, float(values.mean())
    for key, values in rows.loc[rows["part"] == CAPABILITY].groupby(["subject", "relation"], sort=False)["value"]:
        subject, task = key
        yield fact_id(subject, task, ""), f"capability, {task}", float(values.mean())
    for measure, (part, metric) in OF_TEXT.items():
        yield "", measure, float(rows.loc[(rows["part"] == part) & (rows["metric"] == metric), "value"].iloc[0])
    notes = outcome.record["notes"]
    if any("damage" in note for note in notes):
        yield "", "damage where watched", max(note["damage"] for note in notes)


def _attacked(edited: Outcome, null: Outcome, *, paired: bool) -> Iterator[tuple[str, str, float]]:
    for u, n in zip(edited.attacks, null.attacks, strict=True):
        mine, other = u.hidden_scores(), n.hidden_scores()
        for fact, value in mine.items():
            yield fact, u.attack, value
            if paired:
                yield fact, f"{u.attack}, null", other[fact]
                yield fact, f"{u.attack}, excess", value - other[fact]
        yield "", f"{u.attack}, healthy", float(u.health.healthy and n.health.healthy)
