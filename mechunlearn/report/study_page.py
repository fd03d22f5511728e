"""The study as one page: claim by claim beside the paper's numbers, its defects, and what goes beyond it."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
import pandas as pd

from mechunlearn.study.arms import LOOKUP, LOOKUP_PATHS, RESISTANT, arm_named
from mechunlearn.study.claims import (
    CLAIMS,
    CONTROLS,
    DOES_NOT,
    HOLDS,
    OPEN,
    OUTPUT_TRACING,
    SAME_EDIT,
    Claim,
    beside_published,
)
from mechunlearn.study.run import COPIED
from mechunlearn.study.tables import StudyTables

# pandas has no complete types
# pyright: standard

Table = list[list[str]]
"""Rows of texts, the first one the heading."""
FAMILIES = {"path patching": (LOOKUP_PATHS,), "output tracing": OUTPUT_TRACING, "controls": CONTROLS}
DAMAGE = ("KL", "maintain", "neighborhood", "elsewhere", "multiple choice, maintain")
FLIPPED = ("maintain, flipped", "multiple choice, flipped")
FINISHED, UNFINISHED = 0.5, "†"
"""P(injected answer) on the trained prompts below which an edit counts as unfinished; the sign beside its numbers."""
SHOWN_OF_COPIED = ("forget", "edit", "multiple choice, edit", "maintain", "relearning, excess")


def study_page(tables: StudyTables, claims: pd.DataFrame) -> str:
    """The page in Markdown; every number on it is read from the tables."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("mechunlearn.report") / "templates")), autoescape=False,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["table"] = markdown
    paper = beside_published(tables)
    about = [
        {
            "name": claim.name, "says": claim.says[0].upper() + claim.says[1:],
            "measures": "; ".join(m for m, _ in claim.measures),
            "verdict": verdict(claims, claim), "families": family_table(claims, claim),
            "words": {level: word_table(claims, claim, level) for level in ("quick", "standard")},
            "numbers": {m: number_table(tables, paper, m) for m, _ in claim.measures},
        }
        for claim in CLAIMS
    ]  # fmt: skip
    return environment.get_template("study.md.j2").render(
        presets=presets_of(tables), n_seeds=int(tables.arms["n_seeds"].to_numpy().max()), claims=about,
        same=same_edits(tables), finished=FINISHED,
        false_labels=pair_table(tables, LOOKUP, f"{LOOKUP}, false labels", ("relearning, excess",)),
        copied=[
            pair_table(tables, arm, f"{arm}, tuned as {other}", SHOWN_OF_COPIED)
            for arm, other in ((arm_named(name).name, other) for name, other in COPIED.items())
        ],
        draws=draw_table(tables), flipped=[number_table(tables, paper, measure) for measure in FLIPPED],
        beyond={level: beyond_table(tables, level) for level in ("quick", "standard")},
        damage=[pair_table(tables, LOOKUP, RESISTANT, (measure,)) for measure in DAMAGE],
        verdicts=verdict_words(tables),
    ).strip() + "\n"  # fmt: skip


def markdown(table: Table) -> str:
    """A table in Markdown."""
    head, *rows = table
    if not rows:
        return "(Nothing was measured.)"
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def presets_of(tables: StudyTables) -> list[str]:
    """In the order of the tables."""
    return list(dict.fromkeys(tables.arms["preset"]))


def verdict(claims: pd.DataFrame, claim: Claim) -> str:
    """One word for a claim, and in how many comparisons (preset and arm, quick attacks) it is which.

    "holds" needs most of the comparisons of different edits and none against it; "does not hold" at least one against
    it and none for it; everything else cannot be told here.
    """
    own = claims.loc[(claims["claim"] == claim.name) & (claims["level"] == "quick")]
    counts = {word: int((own["word"] == word).sum()) for word in (HOLDS, DOES_NOT, OPEN)}
    same = int((own["why"] == SAME_EDIT).sum())
    word = OPEN
    if counts[HOLDS] > (len(own) - same) / 2 and not counts[DOES_NOT]:
        word = HOLDS
    elif counts[DOES_NOT] and not counts[HOLDS]:
        word = DOES_NOT
    return (
        f"{word} ({len(own)} comparisons: {counts[HOLDS]} for it, {counts[DOES_NOT]} against it, {counts[OPEN]} open, "
        f"{same} of which are of the same edit twice)"
    )


def family_table(claims: pd.DataFrame, claim: Claim) -> Table:
    """Against which kind of arm it holds, in how many presets times arms."""
    own = claims.loc[(claims["claim"] == claim.name) & (claims["level"] == "quick")]
    table = [["against", "for the claim", "against it", "open", "the same edit"]]
    for family, arms in FAMILIES.items():
        of = own.loc[own["against"].isin(arms)]
        if of.empty:
            continue
        same = of["why"] == SAME_EDIT
        counts = [(of["word"] == HOLDS).sum(), (of["word"] == DOES_NOT).sum(), ((of["word"] == OPEN) & ~same).sum()]
        table.append([f"{family} ({', '.join(arms)})", *map(str, counts), str(same.sum())])
    return table


def word_table(claims: pd.DataFrame, claim: Claim, level: str) -> Table:
    """Preset by arm: what became of the claim there."""
    own = claims.loc[(claims["claim"] == claim.name) & (claims["level"] == level)]
    arms, presets = list(dict.fromkeys(own["against"])), list(dict.fromkeys(own["preset"]))
    found = {(r["preset"], r["against"]): r for r in own.to_dict("records")}
    short = {HOLDS: "for", DOES_NOT: "**against**", OPEN: "open"}

    def cell(preset: str, arm: str) -> str:
        row = found.get((preset, arm))
        return "" if row is None else "same edit" if row["why"] == SAME_EDIT else short[row["word"]]

    return [["", *arms], *([preset, *(cell(preset, arm) for arm in arms)] for preset in presets)]


def number_table(tables: StudyTables, paper: pd.DataFrame, measure: str) -> Table:
    """Arm by preset; a sign where the edit is unfinished; the published number, where there is one, in brackets."""
    rows = tables.arms.loc[(tables.arms["measure"] == measure) & (tables.arms["level"] == "quick")]
    rows = rows.loc[~rows["arm"].str.contains(", ") & ~rows["arm"].str.startswith("suppressed")]
    arms, presets = list(dict.fromkeys(rows["arm"])), list(dict.fromkeys(rows["preset"]))
    edited = tables.arms.loc[(tables.arms["measure"] == "edit") & (tables.arms["level"] == "quick")]
    edited = edited.loc[(edited["mean"] < FINISHED) & (edited["arm"] != "original")]
    short = set(zip(edited["arm"], edited["preset"], strict=True))
    ours = {
        (r["arm"], r["preset"]): interval(r) + (f" {UNFINISHED}" if (r["arm"], r["preset"]) in short else "")
        for r in rows.to_dict("records")
    }
    theirs = {
        (r["arm"], r["preset"]): f" (paper {r['published']:.2f})"
        for r in paper.loc[paper["measure"] == measure].to_dict("records")
    }
    body = [[arm, *(ours.get((arm, p), "") + theirs.get((arm, p), "") for p in presets)] for arm in arms]
    return [[measure, *presets], *body]


def interval(row: Any, of: str = "mean") -> str:
    """Value with its 95% interval."""
    return f"{row[of]:.2f} [{row['lower']:.2f}, {row['upper']:.2f}]"


def pair_table(tables: StudyTables, one: str, other: str, measures: Sequence[str]) -> Table:
    """Two arms beside each other, measure by measure."""
    rows = tables.arms.loc[(tables.arms["level"] == "quick") & tables.arms["arm"].isin((one, other))]
    found = {(r["preset"], r["arm"], r["measure"]): interval(r) for r in rows.to_dict("records")}
    table = [["preset", "measure", one, other]]
    for preset in presets_of(tables):
        for measure in measures:
            if (preset, other, measure) in found:
                table.append([preset, measure, *(found[preset, arm, measure] for arm in (one, other))])
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
    """Under how many seeds an arm chose exactly fact lookup's components (all blocks of them)."""
    components = tables.components.assign(arm=tables.components["arm"].str.partition("#")[0])
    whole = components.loc[~components["arm"].isin((LOOKUP, RESISTANT))]
    wanted = {
        (r["preset"], r["seed"], r["block"]): r["components"]
        for r in components.loc[components["arm"] == LOOKUP].to_dict("records")
    }
    same = [
        r["components"] == wanted[r["preset"], r["seed"], r["block"]] for r in whole.to_dict("records")
    ]  # fmt: skip
    shares = whole.assign(same=same).groupby(["arm", "preset"], sort=False)[["same", "of fact lookup"]].mean()
    presets, arms = presets_of(tables), list(dict.fromkeys(whole["arm"]))
    body = [
        [arm, *(f"{100 * shares.loc[(arm, p), 'same']:.0f}%, {100 * shares.loc[(arm, p), 'of fact lookup']:.0f}%"
                for p in presets)]
        for arm in arms
    ]  # fmt: skip
    return [["arm", *presets], *body]


def beyond_table(tables: StudyTables, level: str) -> Table:
    """Fact lookup's edit minus the resistant one, attack by attack: above 0, the latter leaves less to bring back."""
    own = tables.differences
    own = own.loc[(own["arm"] == RESISTANT) & (own["level"] == level) & own["measure"].str.endswith(", excess")]
    table = [["preset", "attack", f"{LOOKUP} minus {RESISTANT}", "Holm's p", "facts", "seeds"]]
    for row in own.to_dict("records"):
        table.append(
            [row["preset"], row["measure"].removesuffix(", excess"), interval(row, "difference"),
             f"{row['p_holm']:.4f}", str(row["n_facts"]), str(row["n_seeds"])]
        )  # fmt: skip
    return table


def verdict_words(tables: StudyTables) -> Table:
    """The verdict on every arm, with the strongest attack's D and its bounds."""
    table = [["preset", "arm", "level", "verdict", "strongest attack", "D"]]
    for row in tables.verdicts.to_dict("records"):
        table.append([row["preset"], row["arm"], row["level"], row["word"], str(row["strongest"]), interval(row, "D")])
    return table
