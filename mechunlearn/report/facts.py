"""Every hidden fact on its own: what each state of the model answers in each form of asking."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.attack.results import AttackResult
from mechunlearn.report.numbers import results_of
from mechunlearn.runs import Cell, Run

# pandas has no complete types
# pyright: standard

FACT = ["subject", "relation", "answer"]
COLUMNS = ["cell", *FACT, "state", "form", "p_true", "correct", "top", "seeds"]
READ = "activations"
"""The form of what was read off the model instead of asked; where, is the attack's chosen setting."""


def fact_table(run: Run) -> pd.DataFrame:
    """One row a (cell, fact, state, form): what the model says there of a hidden fact.

    States: "original" (the cell of that role, asked before anything; answers injected later are candidates there),
    "asked" (this cell's model as it is), then the name of every other attack (after it). Forms: those of asking, and
    "activations" for what an attack reads off.
    p_true is the mean P(true | candidates) over `seeds` seeds, correct the share of them in which the true answer
    ranks first, top the best candidate in most of them ("" if unknown). After `asking`, multiple choice is on the
    scale of the fact's own candidates and may be below 0, see there.
    """
    original = next((cell for cell in run.cells if cell.role == "original"), None)
    at_first = None if original is None else dict(_states(original)).get("asked")
    frames = []
    for cell in run.cells:
        states = list(_states(cell))
        if at_first is not None and cell is not original:
            states.insert(0, ("original", at_first))
        frames += [frame.assign(cell=cell.name, state=state) for state, frame in states]
    empty = pd.DataFrame(columns=pd.Index(COLUMNS))
    return pd.concat(frames, ignore_index=True).reindex(columns=COLUMNS) if frames else empty


def _states(cell: Cell) -> Iterator[tuple[str, pd.DataFrame]]:
    asked = [result for result in cell.edited if result.zero_budget]
    if asked:
        yield "asked", _over_seeds([_forms(result) for result in asked])
    elif cell.edited:  # every attack asks by the prompt before it begins
        first = results_of(cell.edited, cell.edited[0].attack)
        yield "asked", _over_seeds([_hidden(result.before).assign(form="prompt") for result in first])
    for name in dict.fromkeys(result.attack for result in cell.edited if not result.zero_budget):
        yield name, _over_seeds([_forms(result) for result in results_of(cell.edited, name)])


def _forms(result: AttackResult) -> pd.DataFrame:
    """The hidden facts in every form after the attack; in the one form it scores if it kept no others."""
    if result.by_form is not None or result.zero_budget:
        rows = _hidden(result.rows if result.by_form is None else result.by_form)
        return rows.assign(form=rows["setting"])
    return result.final().assign(form=READ if result.access == "activations" else "prompt")


def _hidden(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.loc[rows["part"] == "forget_hidden"]


def _over_seeds(frames: list[pd.DataFrame]) -> pd.DataFrame:
    rows: Any = pd.concat(frames, ignore_index=True)
    keys = [*FACT, "form"]
    tops = rows["top"].fillna("") if "top" in rows else ""  # runs of older versions keep none
    rows = rows.assign(top=tops, correct=rows["correct"].astype(float))
    means = rows.groupby(keys, sort=False).agg(
        p_true=("p_true", "mean"), correct=("correct", "mean"), seeds=("top", "size")
    )
    counts = rows.groupby([*keys, "top"], sort=False).size().reset_index(name="n")
    most = counts.sort_values("n", ascending=False, kind="stable").drop_duplicates(keys)[[*keys, "top"]]
    return means.reset_index().merge(most, on=keys)


def fact_data(frame: pd.DataFrame) -> dict[str, Any]:
    """The table for the report's page, every text once: see `templates/facts.js`, which reads it.

    P(true) in thousandths and shares of seeds in hundredths, as whole numbers; None where a fact has no such row.
    A state that is the same in every cell ("original") is stored once.
    """
    rows: Any = frame
    facts, ids = rows[FACT].drop_duplicates().to_numpy(), rows.groupby(FACT, sort=False).ngroup()
    texts = pd.Index(pd.unique(np.concatenate([rows["form"], rows["top"], facts.ravel()])))
    coded: Any = pd.DataFrame(
        {
            "cell": rows["cell"], "state": rows["state"], "fact": ids, "form": texts.get_indexer(rows["form"]),
            "p": (1000 * rows["p_true"].astype(float)).round().astype(int),
            "correct": (100 * rows["correct"].astype(float)).round().astype(int),
            "top": texts.get_indexer(rows["top"]),
        }
    )  # fmt: skip
    cells, original = [], None
    for name, own in coded.groupby("cell", sort=False):
        states = {state: _columns(group, len(facts)) for state, group in own.groupby("state", sort=False)}
        original = original or states.get("original")
        listed = [
            {"name": state, "read": texts[columns["forms"][0]] == READ, **columns}
            for state, columns in states.items()
            if state != "original"
        ]
        cells.append({"name": name, "original": "original" in states, "states": listed})
    return {
        "facts": texts.get_indexer(facts.ravel()).reshape(facts.shape).tolist(),
        "original": original and {"name": "original", "read": False, **original},
        "cells": cells,
        "texts": texts.tolist(),
    }


def _columns(rows: Any, n_facts: int) -> dict[str, list[Any]]:
    """Of one state: its forms, and for each of them what every fact got, in the order of the facts."""
    found: dict[str, list[Any]] = {"forms": [], "p": [], "correct": [], "top": []}
    for form, group in rows.groupby("form", sort=False):
        found["forms"].append(int(form))
        for key in ("p", "correct", "top"):
            values = np.full(n_facts, None, dtype=object)
            values[group["fact"]] = group[key].tolist()
            found[key].append(values.tolist())
    return found
