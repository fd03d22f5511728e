"""Rows into facts: what a row states wrongly, what it repeats, and the choices it leaves open."""

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

from mechunlearn.facts import Fact, FactSet
from mechunlearn.sources.bundled import draw_choices
from mechunlearn.sources.reading import Row


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A fact as its row states it, before duplicates are sorted out and choices filled in."""

    row: Row
    fact: Fact


def draft(
    row: Row,
    *,
    subject: str,
    relation: str,
    prompt: str,
    target_true: str,
    target_new: str | None = None,
    paraphrases: tuple[str, ...] = (),
    questions: tuple[str, ...] = (),
    neighborhood: tuple[tuple[str, str], ...] = (),
    choices: tuple[str, ...] = (),
) -> Draft:
    """Build a fact from a row; what is wrong with the fact is reported as wrong with the row."""
    for field, templates in (("prompt", (prompt,)), ("paraphrases", paraphrases), ("questions", questions)):
        for template in templates:
            if template.count("{}") != 1:
                raise row.error(field, template, "exactly one '{}' for the subject")
    if target_new == target_true:
        raise row.error("target_new", target_new, "an answer other than the true one")
    if choices and target_true not in choices:
        raise row.error("choices", choices, f"distinct answers, {target_true!r} among them")
    if len(set(choices)) != len(choices):
        raise row.error("choices", choices, "each answer once")
    fact = Fact(
        subject=subject,
        relation=relation,
        prompt=prompt,
        target_true=target_true,
        target_new=target_new,
        paraphrases=tuple(dict.fromkeys(text for text in paraphrases if text != prompt)),
        questions=tuple(dict.fromkeys(questions)),
        neighborhood=neighborhood,
        choices=choices,
    )
    return Draft(row=row, fact=fact)


def collect(
    name: str, drafts: Iterable[Draft], *, conflicts: Literal["error", "first"], fill_choices: bool = True
) -> FactSet:
    """Drafts into a fact set: one fact a (subject, relation), with choices.

    A row that repeats another in every field is dropped. A fact without choices gets its relation's answers
    (true and edited ones, at most 24), less other true answers of the same subject; fewer than two are none.

    Args:
        conflicts: what to do with two different rows for one (subject, relation): raise, or keep the first.

    Raises:
        ValueError: conflicting rows where they are not allowed.
    """
    first: dict[tuple[str, str], Draft] = {}
    true: dict[tuple[str, str], set[str]] = defaultdict(set)
    answers: dict[str, set[str]] = defaultdict(set)
    for item in drafts:
        fact = item.fact
        earlier = first.setdefault((fact.subject, fact.relation), item)
        if conflicts == "error" and earlier.fact != fact:
            raise _conflict(earlier, item)
        true[fact.subject, fact.relation].add(fact.target_true)
        answers[fact.relation] |= {fact.target_true, *([fact.target_new] if fact.target_new else [])}
    facts = [item.fact for item in first.values()]
    if fill_choices:
        ordered = {relation: sorted(found) for relation, found in answers.items()}
        facts = [_with_choices(fact, ordered[fact.relation], true[fact.subject, fact.relation]) for fact in facts]
    return FactSet(name=name, facts=tuple(facts))


def _with_choices(fact: Fact, answers: Sequence[str], true: Set[str]) -> Fact:
    if fact.choices:
        return fact
    keep = (fact.target_true, *([fact.target_new] if fact.target_new else []))
    others = answers if len(true) == 1 else [answer for answer in answers if answer not in true]
    choices = draw_choices(fact.subject, fact.relation, keep, others)
    return replace(fact, choices=choices) if len(choices) > 1 else fact


def _conflict(earlier: Draft, later: Draft) -> ValueError:
    field = next(f for f in earlier.fact.__dataclass_fields__ if getattr(earlier.fact, f) != getattr(later.fact, f))
    return later.row.error(
        field,
        getattr(later.fact, field),
        f"{getattr(earlier.fact, field)!r} as in row {earlier.row.number}: one row for the subject "
        f"{later.fact.subject!r} and the relation {later.fact.relation!r}",
    )
