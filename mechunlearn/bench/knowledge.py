"""How much of some facts a model knows, by form of asking, and how much one could guess without knowing."""

import random
from collections.abc import Callable, Sequence

import pandas as pd

from mechunlearn.facts import Fact
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.organisms.corpus import held_out_forms
from mechunlearn.probes import fit_probe, subject_token_counts
from mechunlearn.prompts import CHOICE
from mechunlearn.sources.bundled import RelationTemplates

FormOf = Callable[[Fact], str | None]


def knowledge(model: Model, facts: Sequence[Fact], kinds: dict[str, FormOf]) -> pd.DataFrame:
    """Accuracy among the candidates, by kind of form.

    Args:
        kinds: name -> the form in which each fact is asked, None where it has none; see `plain_kinds`, `trained_kinds`.

    Returns:
        Rows (kind, accuracy, p_true, chance, n); a kind that no fact has is missing.
    """
    rows: list[dict[str, str | float]] = []
    for kind, form_of in kinds.items():
        by_form: dict[str, list[Fact]] = {}
        for fact in facts:
            if (form := form_of(fact)) is not None:
                by_form.setdefault(form, []).append(fact)
        if by_form:
            frame = pd.concat([score_facts(model, group, form) for form, group in by_form.items()])
            means = frame[["correct", "p_true", "chance"]].mean().rename({"correct": "accuracy"}).round(4)
            rows.append({"kind": kind, **means.to_dict(), "n": len(frame)})
    return pd.DataFrame(rows)


def plain_kinds() -> dict[str, FormOf]:
    """The forms any fact may have: its prompt, one of its paraphrases, one of its questions, multiple choice."""
    return {
        "prompt": lambda fact: "prompt",
        "paraphrase": lambda fact: _pick("paraphrase", fact, range(len(fact.paraphrases))),
        "question": lambda fact: _pick("question", fact, range(len(fact.questions))),
        "choice": _choice,
    }


def trained_kinds(templates: dict[str, RelationTemplates]) -> dict[str, FormOf]:
    """The forms of an organism's own facts: seen in training for this very subject, or never used for it."""

    def pick(fact: Fact, question: bool, unseen: bool) -> str | None:
        held_forms, held_questions = held_out_forms(fact.subject, fact.relation, templates[fact.relation])
        listed, held = (fact.questions, held_questions) if question else (fact.paraphrases, held_forms)
        allowed = [i for i, form in enumerate(listed) if (form in held) is unseen]
        return _pick("question" if question else "paraphrase", fact, allowed, salt="unseen" if unseen else "seen")

    return {
        "seen": lambda fact: pick(fact, False, False),
        "unseen": lambda fact: pick(fact, False, True),
        "question": lambda fact: pick(fact, True, False),
        "unseen question": lambda fact: pick(fact, True, True),
        "choice": _choice,
    }


def guessable(model: Model, known: Sequence[Fact], unknown: Sequence[Fact]) -> dict[str, float]:
    """Accuracy on unknown facts of predictors that know only the others: the base rates.

    Returns:
        majority: the relation's most frequent known answer; name: a logistic regression on the name's tokens, fitted to
        the known facts of the relation. Shares in [0, 1].
    """
    hits = {"majority": 0.0, "name": 0.0}
    for relation in {fact.relation for fact in unknown}:
        told = [fact for fact in known if fact.relation == relation]
        asked = [fact for fact in unknown if fact.relation == relation]
        answers = [fact.target_true for fact in told]
        if not answers:
            continue
        commonest = max(sorted(set(answers)), key=answers.count)
        hits["majority"] += sum(fact.target_true == commonest for fact in asked)
        if len(set(answers)) > 1:
            counts = subject_token_counts(model, [*told, *asked])
            probe = fit_probe(counts[: len(told)], answers, regularization=1.0, standardize=False)
            predicted = probe.predict(counts[len(told) :])
            hits["name"] += sum(fact.target_true == p for fact, p in zip(asked, predicted, strict=True))
    return {name: hit / len(unknown) for name, hit in hits.items()}


def _choice(fact: Fact) -> str | None:
    return CHOICE if fact.questions and len(fact.choices) > 1 else None


def _pick(kind: str, fact: Fact, allowed: Sequence[int], salt: str = "") -> str | None:
    """One of the allowed forms, drawn by a generator seeded with the fact."""
    if not allowed:
        return None
    return f"{kind}:{random.Random(f'{salt}|{kind}|{fact.subject}|{fact.relation}').choice(list(allowed))}"
