"""From which layer on an attribute can be read off the subject's last token by a linear probe, and its baselines."""

import random
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from mechunlearn.facts import Fact
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.probes import held_out_probabilities, is_correct, residual_features, subject_token_counts

FEWEST = 5  # subjects an answer needs, one for each fold of the probe
_COLUMNS = ["relation", "answers", "part", "layer", "accuracy", "majority", "bag", "twin", "baseline", "n"]


def readable_attributes(
    model: Model,
    facts: Sequence[Fact],
    *,
    twin: Model | None = None,
    unread: Collection[tuple[str, str]] | None = None,
    max_facts: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of a probe at the subject's last token, for every relation and layer, beside its baselines.

    The probe is a multinomial logistic regression, scored on subjects that it has not seen. Layer 0 is the stream
    before the first block, layer l + 1 the stream after block l. A second part has only the facts that the twin never
    read; there the twin's own probe at the same layer is a baseline.

    Args:
        twin: a model that never read some of the facts.
        unread: (subject, relation) of these facts; without it, the facts that the twin answers wrongly.
        max_facts: so many facts of a relation at most, drawn by a seeded generator.

    Returns:
        relation, answers, part ("all" or "unknown to the twin"), layer, accuracy, majority, bag, twin (NaN without),
        baseline (the largest of the three), n. Relations that are too small for a held-out probe are missing.
    """
    rows: list[dict[str, object]] = []
    for relation in dict.fromkeys(fact.relation for fact in facts):
        members = [fact for fact in facts if fact.relation == relation]
        group = _usable(random.Random(seed).sample(members, min(len(members), max_facts)))
        labels, subjects = [fact.target_true for fact in group], [fact.subject for fact in group]
        if len(set(labels)) < 2:
            continue
        counts = subject_token_counts(model, group)
        guesses = held_out_probabilities(
            counts, labels, subjects, regularization=1.0, standardize=False, folds=FEWEST, seed=seed
        )
        bag = is_correct(guesses, labels)
        own = _correct(model, group, seed)
        parts: dict[str, Bool[np.ndarray, " fact"]] = {"all": np.ones(len(group), dtype=bool)}
        other = None
        if twin is not None:
            if unread is None:
                unknown = ~score_facts(twin, group)["correct"].to_numpy(dtype=bool)
            else:
                unknown = np.array([(fact.subject, fact.relation) in unread for fact in group])
            if unknown.sum() >= 2 * FEWEST:
                other, parts["unknown to the twin"] = _correct(twin, group, seed), unknown
        answers = np.array(labels)
        commonest = max(sorted(set(labels)), key=labels.count)
        for part, chosen in parts.items():
            for layer, correct in enumerate(own):
                of_twin = float(other[layer][chosen].mean()) if other is not None and part != "all" else np.nan
                majority = float((answers[chosen] == commonest).mean())
                from_name = float(bag[chosen].mean())
                rows.append(
                    {
                        "relation": relation, "answers": len(set(labels)), "part": part, "layer": layer,
                        "accuracy": float(correct[chosen].mean()), "majority": majority, "bag": from_name,
                        "twin": of_twin, "baseline": np.nanmax([majority, from_name, of_twin]), "n": int(chosen.sum()),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows, columns=pd.Index(_COLUMNS))


def _correct(model: Model, facts: Sequence[Fact], seed: int) -> Float[np.ndarray, "layer fact"]:
    labels, subjects = [fact.target_true for fact in facts], [fact.subject for fact in facts]
    features = residual_features(model, facts, "prompt", ("subject_last",))["subject_last"]
    return np.stack(
        [
            is_correct(held_out_probabilities(features[:, layer], labels, subjects, folds=FEWEST, seed=seed), labels)
            for layer in range(features.shape[1])
        ]
    )


def _usable(facts: Sequence[Fact]) -> list[Fact]:
    """Facts whose answer enough subjects share."""
    subjects: dict[str, set[str]] = {}
    for fact in facts:
        subjects.setdefault(fact.target_true, set()).add(fact.subject)
    return [fact for fact in facts if len(subjects[fact.target_true]) >= FEWEST]
