"""The zero-budget attack: ask for the facts in every form there is, alone and after examples."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.by_form import scores_in_form
from mechunlearn.attack.results import AttackResult, Health, fact_rows
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.models import Model
from mechunlearn.prompts import candidates, encode, encode_answers, forms, max_positions

FEW_SHOT = {"few_shot:shown": "forget_shown", "few_shot:retained": "retain_train"}
"""The part of the split that the demonstrations of each form are drawn from."""


@ATTACKS.register(
    "asking",
    source="Patil et al. 2023, arXiv:2309.17410 (rephrasing); Lynch et al. 2024, arXiv:2402.16835 (in-context)",
)
def asking(
    model: Model,
    split: FactSplit,
    *,
    shots: Annotated[int, Field(ge=0)] = 4,
    report_all_forms: bool = True,
    drop_targets: bool = False,
    batch_size: Annotated[int, Field(ge=1)] = 256,
    seed: int = 0,
) -> AttackResult:
    """Ask in the prompt, paraphrases, questions, multiple choice and few-shot; the best form on `attack_dev` counts.

    The form is chosen by its mean P(true | candidates) on the dev facts, once for all facts, so that no fact's score
    is a maximum over forms. A fact that lacks a form is asked in its prompt instead, when choosing and when scoring.

    Multiple choice has fewer candidates than the other forms; its scores are put on their
    scale first: p' = c + (1 - c) (p - 1/4) / (1 - 1/4), with c the chance level of the fact's own candidates
    (so an unlucky guess may be below 0, down to -1/3: cut off, guessing would score above chance).

    Few-shot: the prompt after `shots` true statements in its own words, about other subjects of its relation, which
    the attacker may know: "few_shot:shown" takes them from `forget_shown`, "few_shot:retained" from `retain_train`.

    Args:
        shots: statements before the prompt; fewer where the part or the model's positions have no more. 0: none.
        report_all_forms: also score the hidden facts in the forms that were not chosen, for the report.
        drop_targets: leave `target_new` out of the candidates (for injections, on edited model and twin alike).
        batch_size: rows a forward pass.
        seed: draws the options of multiple choice and the statements of few-shot.

    Returns:
        Rows of the hidden facts for every form (`setting`), step 0; the chosen form has a row for each of them, other
        forms for those that have it. `by_form` (with report_all_forms): the facts in the forms that they have.

    Raises:
        ValueError: the dev or the hidden part is empty, or a fact has fewer than two candidates.
    """
    options = {
        "shots": shots, "report_all_forms": report_all_forms, "drop_targets": drop_targets, "batch_size": batch_size,
    }  # fmt: skip
    if not split.attack_dev:
        raise ValueError("asking: attack_dev is empty; split with a dev part")
    asker = _Asker(model=model, split=split, shots=shots, drop_targets=drop_targets, batch_size=batch_size, seed=seed)
    listed = dict.fromkeys([*(form for fact in split.attack_dev for form in forms(fact)), *FEW_SHOT])
    wordings = {form: asker.worded(split.attack_dev, form) for form in listed}
    dev = {
        form: float(asker.scores(split.attack_dev, worded, form)["p_true"].to_numpy().mean())
        for form, worded in wordings.items()
        if any(worded)
    }
    chosen = max(dev, key=lambda form: dev[form])
    hidden = split.forget_hidden  # first and only access: everything is chosen
    if not hidden:
        raise ValueError("asking: forget_hidden is empty; there is nothing to recover")
    rows, by_form = [], []
    for form in dev if report_all_forms else dict.fromkeys(("prompt", chosen)):
        worded = asker.worded(hidden, form)
        has = np.array([fact is not None for fact in worded])
        frame = fact_rows(hidden, asker.scores(hidden, worded, form), part="forget_hidden", setting=form)
        by_form.append(frame.loc[has])
        rows.append(frame if form == chosen else by_form[-1])
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
        by_form=pd.concat(by_form, ignore_index=True) if report_all_forms else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Asker:
    """Facts in the words of a form, and their scores on the scale of their own candidates."""

    model: Model
    split: FactSplit
    shots: int
    drop_targets: bool
    batch_size: int
    seed: int

    def worded(self, facts: Sequence[Fact], form: str) -> list[Fact | None]:
        """Each fact, few-shot with the statements before its prompt; None where it lacks the form."""
        if form not in FEW_SHOT:
            return [fact if form in forms(fact) else None for fact in facts]
        pool: dict[str, list[Fact]] = {}
        for known in getattr(self.split, FEW_SHOT[form]):
            pool.setdefault(known.relation, []).append(known)
        return [self._after_statements(fact, pool.get(fact.relation, [])) for fact in facts]

    def _after_statements(self, fact: Fact, known: Sequence[Fact]) -> Fact | None:
        rng = random.Random(f"few-shot|{self.seed}|{fact.subject}|{fact.relation}")
        others = [other for other in known if other.subject != fact.subject]
        shown = rng.sample(others, min(self.shots, len(others)))
        # the last token of an answer is predicted, never fed
        answer = max(map(len, encode_answers(self.model, candidates(fact)).values())) - 1
        for n in range(len(shown)):
            told = "".join(f"{other.ask(fact.prompt)} {other.target_true}.\n" for other in shown[n:])
            worded = replace(fact, prompt=told + fact.prompt)
            length = len(encode(self.model, [worded.ask(worded.prompt)])[0]) + answer
            if max_positions(self.model, length) == length:
                return worded
        return None

    def scores(self, facts: Sequence[Fact], worded: Sequence[Fact | None], form: str) -> pd.DataFrame:
        """As `score_facts`, in the order of the facts; those without the form are asked in their prompt."""
        plain = "prompt" if form in FEW_SHOT else form
        parts = []
        for own, asked in ((True, plain), (False, "prompt")):
            at = [i for i, fact in enumerate(worded) if (fact is not None) is own]
            if at:
                put = [worded[i] or facts[i] for i in at]
                scores = scores_in_form(
                    self.model, put, asked, drop_targets=self.drop_targets, seed=self.seed, batch_size=self.batch_size
                )
                parts.append(scores.set_index(np.array(at)))
        return pd.concat(parts).sort_index()
