"""`mechunlearn organism check`: does a model know its facts, and does it look them up at the subject? Any model."""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.bench.criteria import difference, missing, share
from mechunlearn.bench.knowledge import FormOf, base_rate, knowledge
from mechunlearn.bench.mechanism import Mechanism, NothingToMeasure, measure_mechanism
from mechunlearn.bench.readable import readable_attributes
from mechunlearn.facts import Fact
from mechunlearn.models import Model
from mechunlearn.organisms.forget_sets import never_known
from mechunlearn.statistics import exact_interval

FEW = 20  # answers; attributes with at most so many must be readable by a linear probe
WORST_OF = 20  # facts that a relation needs to be named as the worst
FORGOTTEN, KEPT = "forgotten by the twins", "kept"
INTERVENTIONS = ("band", "earlier", "later", "band at the last token", "MLP 0 beside the band")
UP_TO, AFTER = "(d) cost of blocking attention to the subject up to the band", "(d) cost of blocking it after the band"
DONOR = {"few": "(c) donor's answer, few answers", "many": "(c) donor's answer, many answers"}
READABLE = {
    "all": "(a) readable at the subject, above baselines",
    "unknown to the twin": "(a) the same, on facts unknown to the twin",
}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Check:
    """Everything measured on one model, and which criteria hold."""

    name: str
    criteria: pd.DataFrame
    """dataset, criterion, measured, lower, upper, n, needs, outcome, note; the 95 % interval is exact for independent
    facts, NaN for differences."""
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
    unread: Collection[tuple[str, str]] | None = None,
    original: Model | None = None,
    max_facts: int = 300,
    seed: int = 0,
    on_step: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Check:
    """Measure a model against every criterion that applies to it; what cannot be measured is a row that says why.

    Args:
        groups: one for each data set, with different names.
        twin: a model that never knew some of the facts: a baseline for what is readable at the subject.
        unread: (subject, relation) of the facts that the twin never read; without it, those it answers wrongly.
        original: if the model is itself such a twin, the model that knows everything; the default forget sets then
            count as unknown, and only what was kept is asked of it.
        max_facts: so many facts of a relation at most, drawn by a seeded generator; the probes get all.

    Raises:
        ValueError: no groups, two of one name, or one without facts.
    """
    names = [group.dataset for group in groups]
    if not groups or len(set(names)) < len(names) or not all(group.facts for group in groups):
        raise ValueError(f"check: got data sets {names}, allowed: one or more, of different names, each with facts")
    criteria: list[Row] = []
    known, readable, mechanisms = [], [], {}
    done = 0

    def step(text: str) -> None:
        nonlocal done
        on_step(text, done, 3 * len(groups))
        done += 1

    for group in groups:
        excluded = never_known() if original is not None else frozenset[tuple[str, str]]()
        lost = [fact for fact in group.facts if (fact.subject, fact.relation) in excluded]
        told = replace(
            group, facts=tuple(fact for fact in group.facts if (fact.subject, fact.relation) not in excluded)
        )
        asked = replace(told, facts=tuple(_sample(told.facts, max_facts, seed)))
        step(f"{group.dataset}: knowledge")
        table = knowledge(model, asked.facts, group.kinds).assign(dataset=group.dataset, part=KEPT if lost else "all")
        known.append(table)
        criteria += _knows(group, table)
        if original is not None and lost:
            of_lost = knowledge(model, lost, group.kinds).assign(dataset=group.dataset, part=FORGOTTEN)
            known.append(of_lost)
            of_original = knowledge(original, asked.facts, group.kinds)
            criteria += _like_a_twin(group.dataset, table, of_original, of_lost, *base_rate(model, told.facts, lost))
        step(f"{group.dataset}: what is readable at the subject")
        curves = readable_attributes(model, told.facts, twin=twin, unread=unread, seed=seed)
        readable.append(curves.assign(dataset=group.dataset))
        criteria += _readable(group.dataset, curves, model.n_layers, with_twin=twin is not None)
        step(f"{group.dataset}: which MLPs and which attention the answer needs")
        try:
            mechanism = measure_mechanism(model, asked.facts, seed=seed)
        except NothingToMeasure as error:
            wanted = (*(f"(b) cost of ablating {name}" for name in INTERVENTIONS), *DONOR.values(), UP_TO, AFTER)
            criteria += [missing(group.dataset, criterion, str(error)) for criterion in wanted]
            continue
        mechanisms[group.dataset] = mechanism
        criteria += _looks_up(told, mechanism)
    return Check(
        name=model.name,
        criteria=pd.DataFrame(criteria),
        knowledge=pd.concat(known, ignore_index=True),
        readable=pd.concat(readable, ignore_index=True),
        mechanisms=mechanisms,
    )


def _sample(facts: Sequence[Fact], most: int, seed: int) -> Iterator[Fact]:
    """At most so many facts of each relation, of other subjects each."""
    for relation in dict.fromkeys(fact.relation for fact in facts):
        members = [fact for fact in facts if fact.relation == relation]
        yield from random.Random(f"{seed}|{relation}").sample(members, min(len(members), most))


def _knows(group: Subjects, table: pd.DataFrame) -> Iterator[Row]:
    found = {kind: (hits, n) for kind, hits, n in zip(table["kind"], table["correct"], table["n"], strict=True)}
    for kind in group.kinds:
        if kind in found:
            hits, n = found[kind]
            yield share(group.dataset, f"knows, {kind}", np.arange(n) < hits)
        else:
            yield missing(group.dataset, f"knows, {kind}", "no fact has such a form")


def _like_a_twin(
    dataset: str, kept: pd.DataFrame, original: pd.DataFrame, lost: pd.DataFrame, predictor: str, base: float
) -> Iterator[Row]:
    """How far a twin is from guessing what it never read, and from the original in all else."""
    open_forms = lost.loc[~lost["kind"].str.startswith("choice")]
    reached, n = float(open_forms["accuracy"].mean()), int(open_forms["n"].max())
    note = f"{reached:.3f}, mean over forms ({open_forms['accuracy'].min():.3f} to {open_forms['accuracy'].max():.3f})"
    sure = exact_interval(round(base * n), n)
    note += f"; {predictor}: {base:.3f} ({sure.lower:.3f} to {sure.upper:.3f}, as a share of {n})"
    yield difference(dataset, "twin: forgotten facts, distance from the base rate", abs(reached - base), n, note)
    both = kept.merge(original, on="kind", suffixes=("", " original")).query("kind != 'choice by letter alone'")
    apart = np.abs(both["accuracy"].to_numpy() - both["accuracy original"].to_numpy())
    note = f"largest over forms: {both['kind'].iloc[int(apart.argmax())]}"
    n = int(both["n"].to_numpy().max())
    yield difference(dataset, "twin: kept facts, distance from the original", float(apart.max()), n, note)


def _readable(dataset: str, curves: pd.DataFrame, n_layers: int, *, with_twin: bool) -> Iterator[Row]:
    """Mean (over facts) of accuracy above the baseline at two thirds of the depth; the layer is not chosen by the data.

    The first criterion is about attributes with few answers; the one on facts unknown to the twin about all.
    """
    layer = 2 * n_layers // 3
    there = curves.loc[curves["layer"] == layer]
    for part, criterion in READABLE.items():
        if part != "all" and not with_twin:
            continue
        rows = there.loc[(there["part"] == part) & ((there["answers"] <= FEW) | (part != "all"))]
        if rows.empty:
            reason = "no attribute with few answers, each of 5 subjects or more" if part == "all" else "no such facts"
            yield missing(dataset, criterion, reason)
            continue
        rows = rows.assign(above=rows["accuracy"] - rows["baseline"])
        lowest = rows.loc[rows["above"].idxmin()]
        note = f"after {layer} blocks; lowest: {lowest['relation']} {lowest['above']:.2f}"
        mean = float(np.average(rows["above"].to_numpy(), weights=rows["n"].to_numpy()))
        yield difference(dataset, criterion, mean, int(rows["n"].sum()), note)


def _looks_up(group: Subjects, mechanism: Mechanism) -> Iterator[Row]:
    """Criteria (b) to (d); what was right before is what can be lost."""
    answers = {
        r: len({f.target_true for f in group.facts if f.relation == r}) for r in {f.relation for f in group.facts}
    }
    ablations, cut, band = mechanism.ablations, mechanism.knockouts, mechanism.band
    for name in INTERVENTIONS:
        criterion = f"(b) cost of ablating {name}"
        rows = ablations.loc[(ablations["intervention"] == name) & ablations["clean"]]
        if rows.empty:
            yield missing(group.dataset, criterion, f"no MLP {name} than m{band.first} to m{band.last} but layer 0's")
            continue
        rows = rows.assign(hit=~rows["correct"])
        where = f"m{rows['first'].iloc[0]} to m{rows['last'].iloc[0]}"
        yield share(group.dataset, criterion, rows["hit"], f"{where}{_extreme(rows, lowest=name == 'band')}")
    donors = ablations.loc[(ablations["intervention"] == "band") & ablations["has_donor"]]
    donors = donors.assign(hit=donors["donor"])
    is_few = donors["relation"].map(answers) <= FEW
    for name, rows in (("few", donors.loc[is_few]), ("many", donors.loc[~is_few])):
        if len(rows) or name == "few":
            yield share(group.dataset, DONOR[name], rows["hit"], _extreme(rows, lowest=True).removeprefix("; "))
    intact = cut.loc[(cut["last"] == -1) & cut["correct"], "fact"]
    end = int(cut["last"].to_numpy().max())
    for criterion, first, last in ((UP_TO, 0, band.last), (AFTER, band.last + 1, end)):
        rows = cut.loc[(cut["first"] == first) & (cut["last"] == last) & cut["fact"].isin(intact)]
        rows = rows.assign(hit=~rows["correct"])
        if rows.empty:
            yield missing(group.dataset, criterion, "no attention after the band")
        else:
            yield share(group.dataset, criterion, rows["hit"], f"layers {first} to {last}")


def _extreme(rows: pd.DataFrame, *, lowest: bool) -> str:
    """The relation with the lowest or highest share, where there are several with enough facts."""
    by_relation = rows.groupby("relation")["hit"].agg(["mean", "size"]).query(f"size >= {WORST_OF}")
    if len(by_relation) < 2:
        return ""
    at = by_relation["mean"].idxmin() if lowest else by_relation["mean"].idxmax()
    return f"; {'lowest' if lowest else 'highest'}: {at} {by_relation.loc[at, 'mean']:.2f}"
