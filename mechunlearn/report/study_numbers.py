"""The study's numbers as tables of text: arm by preset, arms beside each other, draws, and edits that are the same."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mechunlearn.report.markdown import Table, markdown_table
from mechunlearn.study.arms import LOOKUP
from mechunlearn.study.claims import AGAINST, unfinished
from mechunlearn.study.tables import StudyTables

# pandas has no complete types
# pyright: standard

UNFINISHED = "†"
"""The sign beside the numbers of an unfinished edit."""


def markdown(table: Table) -> str:
    """A table in Markdown; without rows it says so."""
    return markdown_table(table) if len(table) > 1 else "(Nothing was measured.)"


def presets_of(tables: StudyTables) -> list[str]:
    """Those that have arms of the paper to compare fact lookup with, in the order of the tables."""
    return list(dict.fromkeys(tables.arms.loc[tables.arms["arm"].isin(AGAINST), "preset"]))


def seeds_of(tables: StudyTables) -> int:
    """The most seeds that one of them has; of any preset, where there is none of them."""
    presets = presets_of(tables) or list(tables.arms["preset"])
    return int(tables.arms.loc[tables.arms["preset"].isin(presets), "n_seeds"].to_numpy().max())


def interval(row: Any, of: str = "mean") -> str:
    """Value with its 95% interval."""
    return f"{row[of]:.2f} [{row['lower']:.2f}, {row['upper']:.2f}]"


def number_table(tables: StudyTables, paper: pd.DataFrame, measure: str) -> Table:
    """The paper's arms by preset; a sign where the edit is unfinished; the published number, where there is one."""
    rows = tables.arms.loc[(tables.arms["measure"] == measure) & (tables.arms["level"] == "quick")]
    rows = rows.loc[rows["arm"].isin(("original", LOOKUP, *AGAINST)) & rows["preset"].isin(presets_of(tables))]
    arms, presets = list(dict.fromkeys(rows["arm"])), list(dict.fromkeys(rows["preset"]))
    short = unfinished(tables)
    ours = {
        (r["arm"], r["preset"]): interval(r) + (f" {UNFINISHED}" if (r["preset"], r["arm"]) in short else "")
        for r in rows.to_dict("records")
    }
    theirs = {
        (r["arm"], r["preset"]): f" (paper {r['published']:.2f})"
        for r in paper.loc[paper["measure"] == measure].to_dict("records")
    }
    body = [[arm, *(ours.get((arm, p), "") + theirs.get((arm, p), "") for p in presets)] for arm in arms]
    return [[measure, *presets], *body]


def side_by_side(tables: StudyTables, arms: Sequence[str], measures: Sequence[str]) -> Table:
    """Arms beside each other, measure by measure, in the presets that have them all."""
    rows = tables.arms.loc[(tables.arms["level"] == "quick") & tables.arms["arm"].isin(arms)]
    found = {(r["preset"], r["arm"], r["measure"]): interval(r) for r in rows.to_dict("records")}
    table = [["preset", "measure", *arms]]
    for preset in dict.fromkeys(rows["preset"]):
        for measure in measures:
            if all((preset, arm, measure) in found for arm in arms):
                table.append([preset, measure, *(found[preset, arm, measure] for arm in arms)])
    return table


def draw_table(tables: StudyTables) -> Table:
    """How far apart single draws of random MLPs are."""
    table = [["preset", "measure", "draws", "lowest", "highest"]]
    for preset in presets_of(tables):
        for measure in ("multiple choice, edit", "relearning, excess"):
            own = tables.draws.loc[(tables.draws["preset"] == preset) & (tables.draws["measure"] == measure)]
            if len(values := own.groupby(["seed", "draw"])["value"].mean()):
                table.append([preset, measure, str(len(values)), f"{values.min():.2f}", f"{values.max():.2f}"])
    return table


def same_edits(tables: StudyTables) -> Table:
    """Of how many blocks, over all seeds, an arm chose exactly fact lookup's components, and what share of them."""
    components = tables.components.assign(arm=tables.components["arm"].str.partition("#")[0])
    presets = presets_of(tables)
    whole = components.loc[components["arm"].isin(AGAINST) & components["preset"].isin(presets)]
    wanted = {
        (r["preset"], r["seed"], r["block"]): r["components"]
        for r in components.loc[components["arm"] == LOOKUP].to_dict("records")
    }
    same = [r["components"] == wanted[r["preset"], r["seed"], r["block"]] for r in whole.to_dict("records")]
    means = whole.assign(same=same).groupby(["arm", "preset"], sort=False)[["same", "of fact lookup"]].mean()
    shares = {key: (row["same"], row["of fact lookup"]) for key, row in means.iterrows()}

    def cell(arm: str, preset: str) -> str:
        return ", ".join(f"{100 * share:.0f}%" for share in shares.get((arm, preset), ()))

    return [["arm", *presets], *([arm, *(cell(arm, p) for p in presets)] for arm in dict.fromkeys(whole["arm"]))]


def verdict_words(tables: StudyTables) -> Table:
    """The verdict on every arm, with the strongest attack's D and its bounds."""
    table = [["preset", "arm", "level", "verdict", "strongest attack", "D"]]
    for row in tables.verdicts.to_dict("records"):
        table.append([row["preset"], row["arm"], row["level"], row["word"], str(row["strongest"]), interval(row, "D")])
    return table
