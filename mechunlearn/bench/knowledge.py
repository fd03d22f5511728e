"""How much of some facts a model knows, by form of asking, and how much one could guess without knowing."""

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.preprocessing import MultiLabelBinarizer
from threadpoolctl import threadpool_limits

from mechunlearn.facts import Fact
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.organisms.corpus import held_out_forms
from mechunlearn.probes import subject_token_counts
from mechunlearn.prompts import BY_LETTER, CHOICE
from mechunlearn.sources.bundled import RelationTemplates

FormOf = Callable[[Fact], str | None]


def knowledge(model: Model, facts: Sequence[Fact], kinds: Mapping[str, FormOf]) -> pd.DataFrame:
    """Accuracy among the candidates, by kind of form.

    Args:
        kinds: name -> the form in which each fact is asked, None where it has none; see `plain_kinds`, `trained_kinds`.

    Returns:
        Rows (kind, accuracy, correct (how many), p_true, chance, n); a kind that no fact has is missing.
    """
    rows: list[dict[str, str | float]] = []
    for kind, form_of in kinds.items():
        by_form: dict[str, list[Fact]] = {}
        for fact in facts:
            if (form := form_of(fact)) is not None:
                by_form.setdefault(form, []).append(fact)
        if by_form:
            frame = pd.concat([score_facts(model, group, form) for form, group in by_form.items()])
            means = {name: round(float(frame[name].to_numpy().mean()), 4) for name in ("p_true", "chance")}
            correct, n = int(frame["correct"].to_numpy().sum()), len(frame)
            rows.append({"kind": kind, "accuracy": round(correct / n, 4), "correct": correct, **means, "n": n})
    return pd.DataFrame(rows, columns=pd.Index(["kind", "accuracy", "correct", "p_true", "chance", "n"]))


def plain_kinds() -> dict[str, FormOf]:
    """The forms any fact may have: its prompt, one of its paraphrases, one of its questions, multiple choice.

    The prompt counts as a form that the model saw; the others may be new to it.
    """
    return {
        "prompt": lambda fact: "prompt",
        "paraphrase": lambda fact: _pick("paraphrase", fact, range(len(fact.paraphrases))),
        "question": lambda fact: _pick("question", fact, range(len(fact.questions))),
        **_choices(),
    }


def trained_kinds(templates: dict[str, RelationTemplates]) -> dict[str, FormOf]:
    """The forms of an organism's own facts: seen in training for this very subject, or never used for it."""

    def pick(fact: Fact, question: bool, unseen: bool) -> str | None:
        held_forms, held_questions = held_out_forms(fact.subject, fact.relation, templates[fact.relation])
        listed, held = (fact.questions, held_questions) if question else (fact.paraphrases, held_forms)
        allowed = [i for i, form in enumerate(listed) if (form in held) is unseen]
        return _pick("question" if question else "paraphrase", fact, allowed, salt="unseen" if unseen else "seen")

    return {
        "prompt": lambda fact: "prompt",
        "seen": lambda fact: pick(fact, False, False),
        "unseen": lambda fact: pick(fact, False, True),
        "question": lambda fact: pick(fact, True, False),
        "unseen question": lambda fact: pick(fact, True, True),
        **_choices(),
    }


def base_rate(model: Model, known: Sequence[Fact], unknown: Sequence[Fact]) -> tuple[str, float]:
    """How well one can guess unknown facts from the known ones alone.

    Three predictors: each relation's most frequent known answer; a logistic regression on the name's tokens; one on the
    name's tokens and the subject's known answers in other relations. The one that is right most often on the known
    facts of these relations (in 5 folds) is taken, so that the unknown ones do not choose it.

    Returns:
        The predictor in words, and its accuracy on the unknown facts. Relations without known facts count as wrong.
    """
    others: dict[str, list[str]] = {}
    for fact in known:
        others.setdefault(fact.subject, []).append(f"{fact.relation}|{fact.target_true}")
    right = {"most frequent answer": [0.0, 0.0], "name tokens": [0.0, 0.0], "name tokens, other answers": [0.0, 0.0]}
    for relation in dict.fromkeys(fact.relation for fact in unknown):
        told = [fact for fact in known if fact.relation == relation]
        asked = [fact for fact in unknown if fact.relation == relation]
        answers = [fact.target_true for fact in told]
        if not answers:
            continue
        names = subject_token_counts(model, [*told, *asked])
        elsewhere = [[a for a in others.get(f.subject, ()) if a.split("|")[0] != relation] for f in (*told, *asked)]
        both = np.hstack([names, np.asarray(MultiLabelBinarizer().fit_transform(elsewhere), dtype=float)])
        for name, features in zip(right, (np.zeros((len(names), 1)), names, both), strict=True):
            guesses, predicted = _guess(features, answers)
            share = sum(a == g for a, g in zip(answers, guesses, strict=True)) / len(answers)
            right[name][0] += share * len(asked)
            right[name][1] += sum(fact.target_true == p for fact, p in zip(asked, predicted, strict=True))
    chosen = max(right, key=lambda name: right[name][0])
    return chosen, right[chosen][1] / len(unknown)


def _guess(features: np.ndarray, answers: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Guesses for the first rows, which have answers, each from the other folds; and for the rest, from all of them."""
    n = len(answers)
    if len(set(answers)) < 2 or n < 10:
        commonest = max(sorted(set(answers)), key=list(answers).count)
        return [commonest] * n, [commonest] * (len(features) - n)
    folds = KFold(5, shuffle=True, random_state=0)
    with threadpool_limits(1):
        guesses = cross_val_predict(LogisticRegression(max_iter=1000), features[:n], answers, cv=folds)
        model = LogisticRegression(max_iter=1000).fit(features[:n], answers)
    return list(map(str, guesses)), list(map(str, model.predict(features[n:])))


def _choices() -> dict[str, FormOf]:
    def if_askable(form: str) -> FormOf:
        return lambda fact: form if fact.questions and len(fact.choices) > 1 else None

    return {"choice": if_askable(CHOICE), "choice by letter alone": if_askable(BY_LETTER)}


def _pick(kind: str, fact: Fact, allowed: Sequence[int], salt: str = "") -> str | None:
    """One of the allowed forms, drawn by a generator seeded with the fact."""
    if not allowed:
        return None
    return f"{kind}:{random.Random(f'{salt}|{kind}|{fact.subject}|{fact.relation}').choice(list(allowed))}"
