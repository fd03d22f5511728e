"""How much of the bundled data sets a model knows, in forms it saw for a subject and in forms it did not."""

import random
from collections.abc import Sequence

import pandas as pd

from mechunlearn.facts import Fact
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.organisms.corpus import held_out_forms
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.sources.bundled import BUNDLED, RelationTemplates, load_bundled, load_templates

KINDS = ("seen", "unseen", "question", "unseen question", "choice")


def knowledge(model: Model, *, datasets: Sequence[str] = BUNDLED, max_facts: int = 800, seed: int = 0) -> pd.DataFrame:
    """Accuracy among the candidates by data set, kind of form, and whether the fact is in a default forget set.

    Kinds: "seen" (a declarative form used in training for that subject), "unseen" (one never used for it),
    "question" and "unseen question", "choice" (shuffled multiple choice).

    Returns:
        Rows (dataset, part, kind, accuracy, p_true, chance, n); part is "kept" or "forgotten by the twins".
    """
    excluded = never_known()
    rows: list[dict[str, str | float]] = []
    for dataset in datasets:
        facts = load_bundled(dataset)
        for part, wanted in (("kept", False), ("forgotten by the twins", True)):
            chosen = [fact for fact in facts if ((fact.subject, fact.relation) in excluded) is wanted]
            chosen = random.Random(seed).sample(chosen, min(len(chosen), max_facts))
            for kind in KINDS:
                rows.append({"dataset": dataset, "part": part, "kind": kind, **_score(model, dataset, chosen, kind)})
    return pd.DataFrame(rows)


def _score(model: Model, dataset: str, facts: Sequence[Fact], kind: str) -> dict[str, float]:
    templates = load_templates(dataset)
    by_form: dict[str, list[Fact]] = {}
    for fact in facts:
        by_form.setdefault(_form(fact, kind, templates[fact.relation]), []).append(fact)
    frame = pd.concat([score_facts(model, group, form) for form, group in by_form.items()])
    return {
        "accuracy": round(float(frame["correct"].to_numpy().mean()), 4),
        "p_true": round(float(frame["p_true"].to_numpy().mean()), 4),
        "chance": round(float(frame["chance"].to_numpy().mean()), 4),
        "n": len(frame),
    }


def _form(fact: Fact, kind: str, templates: RelationTemplates) -> str:
    """Name of one form of the wanted kind, drawn by a generator seeded with the fact."""
    if kind == "choice":
        return "choice"
    held_forms, held_questions = held_out_forms(fact.subject, fact.relation, templates)
    rng = random.Random(f"{kind}|{fact.subject}|{fact.relation}")
    unseen = kind.startswith("unseen")
    if kind.endswith("question"):
        return f"question:{rng.choice([i for i, q in enumerate(fact.questions) if (q in held_questions) is unseen])}"
    choice = rng.choice([i for i, form in enumerate(fact.paraphrases) if (form in held_forms) is unseen])
    return f"paraphrase:{choice}"
