"""What the model says about facts: accuracy, P(true), edit success, and whether neighbors stayed as they were."""

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from mechunlearn.evaluate.results import COLUMNS
from mechunlearn.facts import Fact
from mechunlearn.metrics import candidate_log_probs, score_facts
from mechunlearn.models import Model
from mechunlearn.prompts import candidates, forms, render

FormKind = Literal["prompt", "paraphrase", "question", "choice"]


def knowledge_rows(
    model: Model,
    facts: Sequence[Fact],
    part: str,
    *,
    kinds: Sequence[FormKind],
    max_forms: int,
    drop_targets: bool,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """p_true, accuracy, chance and, of facts with a `target_new` that is a candidate, p_new; in every form a fact has.

    At most `max_forms` of a kind.
    """
    asked: dict[str, list[Fact]] = {}
    for fact in facts:
        for form in forms(fact):
            kind, _, index = form.partition(":")
            if kind in kinds and int(index or 0) < max_forms:
                asked.setdefault(form, []).append(fact)
    rows = []
    for form, group in asked.items():
        scores = score_facts(model, group, form, drop_targets=drop_targets, batch_size=batch_size, seed=seed)
        for metric, column in (("p_true", "p_true"), ("accuracy", "correct"), ("chance", "chance")):
            rows += [(part, *fact.key, form, metric, float(v)) for fact, v in zip(group, scores[column], strict=True)]
        new = zip(group, scores["p_new"], strict=True)
        rows += [(part, *fact.key, form, "p_new", float(p)) for fact, p in new if p == p]  # NaN: no candidate
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def edit_success_rows(model: Model, facts: Sequence[Fact], part: str, *, batch_size: int) -> pd.DataFrame:
    """Whether P(target_new) beats P(target_true) in the prompt, of the facts that have one.

    Source: Meng et al. 2022, arXiv:2202.05262 (efficacy: P(new) > P(true)).
    """
    facts = [fact for fact in facts if fact.target_new is not None]
    among = [candidates(fact) for fact in facts]
    scored = candidate_log_probs(model, [render(f, "prompt") for f in facts], among, batch_size=batch_size)
    rows = []
    for fact, answers, log_probs in zip(facts, among, scored, strict=True):
        p = dict(zip(answers, log_probs.double().softmax(-1).tolist(), strict=True))
        p_new = p[fact.target_new or ""]
        rows.append((part, *fact.key, "prompt", "edit_success", float(p_new > p[fact.target_true])))
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def neighborhood_rows(model: Model, facts: Sequence[Fact], part: str, *, batch_size: int) -> pd.DataFrame:
    """How often a neighbor's own answer still beats the edit's target, a mean over the neighbors of each fact.

    Source: Meng et al. 2022, arXiv:2202.05262 (specificity).
    """
    asked = [
        (fact, prompt, answer)
        for fact in facts
        for prompt, answer in fact.neighborhood
        if fact.target_new is not None and answer != fact.target_new
    ]
    scored = candidate_log_probs(
        model, [prompt for _, prompt, _ in asked], [(own, fact.target_new or "") for fact, _, own in asked],
        batch_size=batch_size,
    )  # fmt: skip
    rows = [
        (part, *fact.key, f"neighbor:{i}", "neighborhood", float(own > new))
        for i, ((fact, _, _), (own, new)) in enumerate(zip(asked, (s.tolist() for s in scored), strict=True))
    ]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))
