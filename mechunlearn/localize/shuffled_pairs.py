"""Control: what a localizer finds where there is nothing to find."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from mechunlearn.components import ComponentScores
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize import LOCALIZERS
from mechunlearn.models import Model


@LOCALIZERS.register("shuffled_pairs", source="control: pairs with the same answer, or dealt answers; for every score")
def shuffled_pairs(
    model: Model,
    facts: Sequence[Fact],
    *,
    retain: Sequence[Fact] | None = None,
    twin: Model | None = None,
    method: str = "attribution_patching",
    options: Mapping[str, bool | int | float | str | Sequence[str]] | None = None,
    null: Literal["pairs", "answers"] | None = None,
    draws: Annotated[int, Field(ge=1)] = 5,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Run a localizer on pairs with the same answer, or on facts with dealt answers, for a null distribution.

    pairs: corrupt = another subject with the *same* answer. Subjects, and hence all activations, differ as in the real
    pairs, the answer does not: what the scores then are is what they owe to the exchange of subjects alone. Facts whose
    answer no other subject of theirs has are left out.
    answers: the answers of each relation are dealt anew among its facts, so that none keeps its subject's and each
    is among the fact's choices: what the scores then are is what they owe to the prompts, for the model does not give
    these answers. Facts for which no other answer is there are left out.

    score = mean over `draws` drawings; there may be fewer rows than facts.

    Sign and units: those of `method`. Expected 0 on pairs for exact effects and for the form "both" of first-order
        scores, which change their sign when the two runs are exchanged. The forms "denoise" and "noise" are shifted by
        minus and plus half the metric's curvature along the exchange, which real pairs share. Dealt answers
        mirror signed effects: of K answers in a relation, the one that a fact is given or compared with is the true one
        of the other run 1 / (K - 1) of the time, so expect about -1 / (K - 1) of the real effect, not 0. With K = 2
        the true answers are merely exchanged, and a probe reads them as well as before.

    Args:
        retain: facts to keep, for methods that take some; they keep their answers.
        twin: a model that never knew the facts, for methods that take one.
        method: any localizer that is not a control.
        options: of that method; its own `donors` and `seed` are set here.
        null: None takes pairs where the method has an option `donors`, else answers.
        draws: drawings of donors and counterfactuals, or of answers, with the seeds from `seed` on.

    Returns:
        Scores whose notes hold `null` ("pairs" or "answers"), `draws` (the value of each component in each draw),
        `standard_deviation` over them, and `n_left_out`.

    Raises:
        ValueError: a control, or pairs for a method without; no two subjects that share an answer (pairs), or whose
            answers could be exchanged (answers).
    """
    chosen, given = LOCALIZERS.get(method), dict(options or {})
    able = [m for m in LOCALIZERS.methods() if not m.source.startswith("control")]
    if null == "pairs":
        able = [m for m in able if "donors" in m.options.model_fields]
    if chosen not in able:
        raise ValueError(
            f"shuffled_pairs: option 'method': got {method!r}, allowed: {', '.join(one.name for one in able)}"
        )
    if fixed := {"donors", "seed"} & set(given):
        raise ValueError(
            f"shuffled_pairs: option 'options': got {sorted(fixed)[0]!r}, which it sets itself; leave it out"
        )
    null = null or ("pairs" if "donors" in chosen.options.model_fields else "answers")
    used = _sharing(facts) if null == "pairs" else _exchangeable(facts, seed)
    if not used:
        lacks = "with the same answer" if null == "pairs" else "of one relation whose answers could be exchanged"
        raise ValueError(f"shuffled_pairs: got {len(facts)} facts, no two of them {lacks}; give more facts")
    checked = chosen.validate(given | ({"donors": "same_answer"} if null == "pairs" else {}))

    def drawn(number: int) -> ComponentScores:
        asked = used if null == "pairs" else dealt_answers(used, number)
        return chosen.function(model, asked, **checked | chosen.wanted(seed=number, retain=retain, twin=twin))

    found = [drawn(seed + draw) for draw in range(draws)]
    values = np.stack([scores.values for scores in found])
    first = found[0]
    return replace(
        first,
        method="shuffled_pairs",
        sign=f"null of {method}: {first.sign}",
        per_fact=np.mean([scores.per_fact for scores in found], axis=0),
        options={"method": method, "options": dict(first.options), "null": null, "draws": draws, "seed": seed},
        facts_sha256=hash_facts(used),
        notes={
            "null": null,
            "draws": values.tolist(),
            "standard_deviation": values.std(axis=0, ddof=1).tolist() if draws > 1 else None,
            "n_left_out": len(facts) - len(used),
            "first_draw": dict(first.notes),
        },
    )


def dealt_answers(facts: Sequence[Fact], seed: int) -> tuple[Fact, ...]:
    """The facts, each with the answer of another fact of its relation.

    No fact gets an answer that its subject has or that is not among its choices; where not all can be dealt, as few as
    possible keep their own. Who gets which depends on the seed and the set of facts, not on their order.
    """
    dealt = list(facts)
    rows_of: dict[str, list[int]] = {}
    for row in sorted(range(len(facts)), key=lambda row: facts[row].key):
        rows_of.setdefault(facts[row].relation, []).append(row)
    for relation, rows in rows_of.items():
        own: dict[str, set[str]] = {}
        for row in rows:
            own.setdefault(facts[row].subject, set()).add(facts[row].target_true)
        answers = sorted({facts[row].target_true for row in rows})
        fits = [
            [a not in own[facts[row].subject] and a in (facts[row].choices or answers) for a in answers] for row in rows
        ]
        held = [answers.index(facts[row].target_true) for row in rows]
        rng = np.random.default_rng(list(f"{seed} {relation}".encode()))
        costs = np.where(np.array(fits)[:, held], rng.random((len(rows), len(rows))), np.inf)
        np.fill_diagonal(costs, len(rows))  # dearer than all the others together
        for row, giver in zip(rows, linear_sum_assignment(costs)[1], strict=True):
            dealt[row] = _with_answer(facts[row], answers[held[giver]])
    return tuple(dealt)


def _with_answer(fact: Fact, answer: str) -> Fact:
    return replace(fact, target_true=answer, target_new=None if fact.target_new == answer else fact.target_new)


def _sharing(facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose answer another subject of their relation has."""
    holders: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        holders.setdefault((fact.relation, fact.target_true), set()).add(fact.subject)
    return [fact for fact in facts if len(holders[fact.relation, fact.target_true]) > 1]


def _exchangeable(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """The facts whose answers can be dealt among themselves so that none keeps its own."""
    dealt = dealt_answers(facts, seed)
    return [fact for fact, other in zip(facts, dealt, strict=True) if fact.target_true != other.target_true]
