"""`mechunlearn organism check`: does a model know its facts, and does it look them up at the subject? Any model."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechunlearn.bench.knowledge import FormOf, guessable, knowledge
from mechunlearn.bench.mechanism import Mechanism, measure_mechanism
from mechunlearn.bench.readable import readable_attributes
from mechunlearn.facts import Fact
from mechunlearn.models import Model
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.statistics import exact_interval

FEW = 20  # answers; attributes with at most so many must be readable by a linear probe
FORGOTTEN, KEPT = "forgotten by the twins", "kept"

NEEDS = {
    "knows, prompt": (">=", 0.97),
    "knows, seen": (">=", 0.97),
    "knows, question": (">=", 0.97),
    "knows, unseen": (">=", 0.85),
    "knows, paraphrase": (">=", 0.85),
    "knows, unseen question": (">=", 0.85),
    "knows, choice": (">=", 0.90),
    "(a) readable at the subject, above baselines": (">=", 0.50),
    "(a) the same, on facts unknown to the twin": (">=", 0.50),
    "(b) cost of ablating band": (">=", 0.60),
    "(b) cost of ablating earlier": ("<=", 0.15),
    "(b) cost of ablating later": ("<=", 0.15),
    "(b) cost of ablating band at the last token": ("<=", 0.15),
    "(c) donor's answer, few answers": (">=", 0.60),
    "(c) donor's answer, many answers": ("aim", 0.80),
    "(d) cost of blocking attention to the subject up to the band": ("<=", 0.15),
    "(d) cost of blocking it after the band": (">=", 0.60),
    "twin: forgotten facts, distance from the base rate": ("<=", 0.05),
    "twin: kept facts, distance from the original": ("<=", 0.02),
}
"""Criterion -> what it needs; an aim is reported, not demanded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Check:
    """Everything measured on one model, and which criteria hold."""

    name: str
    criteria: pd.DataFrame
    """dataset, criterion, measured, lower, upper (95 %, exact; NaN for differences), n, needs, holds."""
    knowledge: pd.DataFrame
    readable: pd.DataFrame
    mechanisms: Mapping[str, Mechanism]
    """By data set; one that the model does not know enough of is missing."""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """One data set as it is to be checked."""

    dataset: str
    facts: tuple[Fact, ...]
    kinds: Mapping[str, FormOf]


def check_model(
    model: Model,
    groups: Sequence[Subjects],
    *,
    twin: Model | None = None,
    original: Model | None = None,
    max_facts: int = 300,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Check:
    """Measure a model against every criterion that applies to it.

    Args:
        twin: a model that never knew some of the facts: a baseline for what is readable at the subject.
        original: if the model is itself such a twin, the model that knows everything; the default forget sets then
            count as unknown, and only what was kept is asked of it.
        max_facts: so many facts of a relation at most, drawn by a seeded generator; the probes get all.
    """
    criteria: list[dict[str, Any]] = []
    known, readable, mechanisms = [], [], {}
    steps, done = 3 * len(groups), 0
    for group in groups:
        excluded = never_known() if original is not None else frozenset[tuple[str, str]]()
        lost = [fact for fact in group.facts if (fact.subject, fact.relation) in excluded]
        told = [fact for fact in group.facts if (fact.subject, fact.relation) not in excluded]
        facts = _sample(told, max_facts, seed)

        def step(text: str, dataset: str = group.dataset) -> None:
            nonlocal done
            on_step(f"{dataset}: {text}", done, steps)
            done += 1

        def add(criterion: str, measured: float, n: int, interval: bool = True, dataset: str = group.dataset) -> None:
            criteria.append(_row(dataset, criterion, measured, n, interval))

        step("knowledge")
        table = knowledge(model, facts, dict(group.kinds))
        known.append(table.assign(dataset=group.dataset, part=KEPT if original else "all"))
        for kind, accuracy, n in zip(table["kind"], table["accuracy"], table["n"], strict=True):
            add(f"knows, {kind}", accuracy, n)
        if original is not None and lost:
            of_lost = knowledge(model, lost, dict(group.kinds))
            of_original = knowledge(original, facts, dict(group.kinds))
            known.append(of_lost.assign(dataset=group.dataset, part=FORGOTTEN))
            base = guessable(model, told, lost)
            reached = float(of_lost["accuracy"][of_lost["kind"] != "choice"].mean())
            outside = max(reached - max(base.values()), min(base.values()) - reached, 0.0)
            add("twin: forgotten facts, distance from the base rate", outside, len(lost), interval=False)
            apart = (table["accuracy"] - of_original["accuracy"]).abs()[table["kind"] != "choice"].max()
            add("twin: kept facts, distance from the original", float(apart), len(facts), interval=False)
        step("what is readable at the subject")
        curves = readable_attributes(model, told, twin=twin, seed=seed).assign(dataset=group.dataset)
        readable.append(curves)
        for part, criterion in _READABLE.items():
            found = _readable_by_two_thirds(curves, part, model.n_layers)
            if found is not None:
                add(criterion, *found, interval=False)
        step("which MLPs and which attention the answer needs")
        try:
            mechanism = measure_mechanism(model, facts, seed=seed)
        except ValueError:
            continue  # too little is known: the rows above say so
        mechanisms[group.dataset] = mechanism
        for criterion, hits in _causal(mechanism, facts):
            add(criterion, float(hits.mean()), len(hits))
    return Check(
        name=model.name,
        criteria=pd.DataFrame(criteria),
        knowledge=pd.concat(known, ignore_index=True),
        readable=pd.concat(readable, ignore_index=True),
        mechanisms=mechanisms,
    )


_READABLE = {
    "all": "(a) readable at the subject, above baselines",
    "unknown to the twin": "(a) the same, on facts unknown to the twin",
}


def _sample(facts: Sequence[Fact], most: int, seed: int) -> list[Fact]:
    """At most so many facts of each relation."""
    chosen: list[Fact] = []
    for relation in dict.fromkeys(fact.relation for fact in facts):
        members = [fact for fact in facts if fact.relation == relation]
        chosen += random.Random(seed).sample(members, min(len(members), most))
    return chosen


def _readable_by_two_thirds(curves: pd.DataFrame, part: str, n_layers: int) -> tuple[float, int] | None:
    """Largest mean (over facts) of accuracy above the baseline up to two thirds of the depth; few answers only."""
    if curves.empty:
        return None
    rows = curves[(curves["part"] == part) & (curves["layer"] <= 2 * n_layers // 3)]
    if part == "all":
        rows = rows[rows["answers"] <= FEW]
    if rows.empty:
        return None
    above = (rows["accuracy"] - rows["baseline"]) * rows["n"]
    by_layer = above.groupby(rows["layer"]).sum() / rows["n"].groupby(rows["layer"]).sum()
    return float(by_layer.max()), int(rows.groupby("layer")["n"].sum().max())


def _causal(mechanism: Mechanism, facts: Sequence[Fact]) -> list[tuple[str, pd.Series]]:
    """Criterion -> one value per fact."""
    answers = {r: len({f.target_true for f in facts if f.relation == r}) for r in {f.relation for f in facts}}
    ablations, cut = mechanism.ablations, mechanism.knockouts
    found: list[tuple[str, pd.Series]] = []
    for name, rows in ablations.groupby("intervention", sort=False):
        found.append((f"(b) cost of ablating {name}", rows["clean"].astype(float) - rows["correct"].astype(float)))
    band = ablations[ablations["intervention"] == "band"]
    few = band["relation"].map(answers) <= FEW
    for name, chosen in (("few", few), ("many", ~few)):
        if chosen.any():
            found.append((f"(c) donor's answer, {name} answers", band["donor"][chosen].astype(float)))
    whole = cut[cut["last"] == -1].set_index("fact")["correct"].astype(float)
    end, last = int(cut["last"].max()), mechanism.band.last
    before = cut[(cut["first"] == 0) & (cut["last"] == last)].set_index("fact")["correct"].astype(float)
    found.append(("(d) cost of blocking attention to the subject up to the band", whole - before))
    if last < end:
        after = cut[(cut["first"] == last + 1) & (cut["last"] == end)].set_index("fact")["correct"].astype(float)
        found.append(("(d) cost of blocking it after the band", whole - after))
    return found


def _row(dataset: str, criterion: str, measured: float, n: int, interval: bool) -> dict[str, Any]:
    sign, bound = NEEDS[criterion]
    holds = {">=": measured >= bound, "<=": measured <= bound, "aim": True}[sign]
    ends = exact_interval(round(max(measured, 0.0) * n), n) if interval else None
    return {
        "dataset": dataset,
        "criterion": criterion,
        "measured": round(measured, 4),
        "lower": round(ends.lower, 4) if ends else float("nan"),
        "upper": round(ends.upper, 4) if ends else float("nan"),
        "n": n,
        "needs": f"{'aim at' if sign == 'aim' else sign} {bound:.2f}",
        "holds": holds,
    }
