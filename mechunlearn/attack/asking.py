"""The zero-budget attack: ask for the facts in every form there is."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult, Health, fact_rows
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.prompts import candidates, forms


@ATTACKS.register("asking", source="Patil et al. 2023, arXiv:2309.17410 (rephrasing); control: no attack at all")
def asking(
    model: Model,
    split: FactSplit,
    *,
    report_all_forms: bool = True,
    drop_targets: bool = False,
    batch_size: Annotated[int, Field(ge=1)] = 256,
    seed: int = 0,
) -> AttackResult:
    """Ask in the prompt, every paraphrase, every question and multiple choice; the best form on `attack_dev` counts.

    The form is chosen by its mean P(true | candidates) on the dev facts, once for all facts, so that no fact's score
    is a maximum over forms. Multiple choice has fewer candidates than the other forms; its scores are put on their
    scale first: p' = c + (1 - c) (p - 1/4) / (1 - 1/4), with c the chance level of the fact's own candidates
    (so an unlucky guess may be below 0, down to -1/3: cut off, guessing would score above chance).

    Args:
        report_all_forms: also score the hidden facts in the forms that were not chosen, for the report.
        drop_targets: leave `target_new` out of the candidates (for injections, on edited model and twin alike).
        batch_size: rows a forward pass.
        seed: draws the options of multiple choice.

    Returns:
        Rows of the hidden facts for every form (`setting`), step 0; facts that lack a form have no row for it.

    Raises:
        ValueError: the dev or the hidden part is empty, or a fact has fewer than two candidates.
    """
    options = {"report_all_forms": report_all_forms, "drop_targets": drop_targets, "batch_size": batch_size}
    if not split.attack_dev:
        raise ValueError("asking: attack_dev is empty; split with a dev part")

    def score(facts: Sequence[Fact], form: str) -> pd.DataFrame:
        scores = score_facts(model, facts, form, drop_targets=drop_targets, batch_size=batch_size, seed=seed)
        if form == "choice":
            own = np.array([1 / len(candidates(fact, drop_targets=drop_targets)) for fact in facts])
            skill = (scores["p_true"] - scores["chance"]) / (1 - scores["chance"])
            scores["p_true"] = own + (1 - own) * skill
        return scores

    common = [form for form in forms(split.attack_dev[0]) if all(form in forms(fact) for fact in split.attack_dev)]
    dev = {form: float(score(split.attack_dev, form)["p_true"].to_numpy().mean()) for form in common}
    chosen = max(common, key=lambda form: dev[form])
    hidden = split.forget_hidden  # first and only access: everything is chosen
    if not hidden:
        raise ValueError("asking: forget_hidden is empty; there is nothing to recover")
    rows = []
    for form in common if report_all_forms else dict.fromkeys(("prompt", chosen)):
        able = [fact for fact in hidden if form in forms(fact)]
        if form == chosen:  # the deciding form must score every hidden fact: ask the others by their prompt
            other = [fact for fact in hidden if form not in forms(fact)]
            rows += [fact_rows(other, score(other, "prompt"), part="forget_hidden", setting=form)] if other else []
        if able:
            rows.append(fact_rows(able, score(able, form), part="forget_hidden", setting=form))
    frame = pd.concat(rows, ignore_index=True)
    return AttackResult(
        attack="asking",
        access="prompts",
        decides=True,
        zero_budget=True,
        rows=frame,
        before=frame.loc[frame["setting"] == "prompt"].reset_index(drop=True),
        chosen=chosen,
        health=Health(),
        options=options,
        seed=seed,
        model=model.name,
        facts_sha256=split.sha256,
        notes={"dev_p_true": dev},
    )
