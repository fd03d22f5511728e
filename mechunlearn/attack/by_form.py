"""Hidden facts in every form of asking, after an attack: for looking at single facts, never for choosing."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mechunlearn.attack.results import fact_rows
from mechunlearn.facts import Fact
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.prompts import candidates, forms


def scores_in_form(
    model: Model, facts: Sequence[Fact], form: str, *, drop_targets: bool, seed: int, batch_size: int = 256
) -> pd.DataFrame:
    """As `score_facts`, with multiple choice on the scale of the fact's own candidates.

    It has fewer options than the other forms have candidates: p' = c + (1 - c) (p - 1/4) / (1 - 1/4), with c the chance
    level of the fact's own candidates (so an unlucky guess may be below 0, down to -1/3: cut off, guessing would score
    above chance).
    """
    scores = score_facts(model, facts, form, drop_targets=drop_targets, batch_size=batch_size, seed=seed)
    if form == "choice":
        own = np.array([1 / len(candidates(fact, drop_targets=drop_targets)) for fact in facts])
        skill = (scores["p_true"] - scores["chance"]) / (1 - scores["chance"])
        scores["p_true"] = own + (1 - own) * skill
    return scores


def in_every_form(model: Model, facts: Sequence[Fact], *, drop_targets: bool, seed: int, step: int = 0) -> pd.DataFrame:
    """Rows of a result, one a (fact, form it has), with the form as `setting`."""
    frames = []
    for form in dict.fromkeys(form for fact in facts for form in forms(fact)):
        able = [fact for fact in facts if form in forms(fact)]
        scores = scores_in_form(model, able, form, drop_targets=drop_targets, seed=seed)
        frames.append(fact_rows(able, scores, part="forget_hidden", setting=form, step=step))
    return pd.concat(frames, ignore_index=True)
