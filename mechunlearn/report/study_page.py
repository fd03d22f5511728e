"""The study as one page: claim by claim beside the paper's numbers, its defects, and what goes beyond it."""

from importlib.resources import files

import jinja2
import pandas as pd

from mechunlearn.report.beyond import beyond_table
from mechunlearn.report.editors import editors_table
from mechunlearn.report.markdown import Table
from mechunlearn.report.study_numbers import (
    draw_table,
    markdown,
    number_table,
    presets_of,
    same_edits,
    seeds_of,
    side_by_side,
    verdict_words,
)
from mechunlearn.study.arms import FORGET, LOOKUP, LOOKUP_PATHS, RESISTANT, UNRESISTED, arm_named
from mechunlearn.study.claims import (
    CLAIMS,
    CONTROLS,
    DOES_NOT,
    FINISHED,
    HOLDS,
    OPEN,
    OUTPUT_TRACING,
    SAME_EDIT,
    Claim,
    beside_published,
)
from mechunlearn.study.parts import COPIED
from mechunlearn.study.tables import StudyTables

# pandas has no complete types
# pyright: standard

FAMILIES = {"path patching": (LOOKUP_PATHS,), "output tracing": OUTPUT_TRACING, "controls": CONTROLS}
DAMAGE = ("KL", "perplexity ratio", "maintain", "neighborhood", "elsewhere", "multiple choice, maintain")
FLIPPED = ("maintain, flipped", "multiple choice, flipped")
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
        presets=presets_of(tables), n_seeds=seeds_of(tables), claims=about,
        same=same_edits(tables), finished=FINISHED, damage=[number_table(tables, paper, m) for m in DAMAGE[:2]],
        false_labels=side_by_side(tables, (LOOKUP, f"{LOOKUP}, false labels"), ("relearning, excess",)),
        copied=[
            side_by_side(tables, (arm, f"{arm}, tuned as {other}"), SHOWN_OF_COPIED)
            for arm, other in ((arm_named(name).name, other) for name, other in COPIED.items())
        ],
        draws=draw_table(tables), flipped=[number_table(tables, paper, measure) for measure in FLIPPED],
        beyond=[
            {level: beyond_table(tables, level, arms[0]) for level in ("quick", "standard")}
            | {"damage": side_by_side(tables, (LOOKUP, *arms), ("forget", "edit", "multiple choice, edit", *DAMAGE))}
            for arms in ((RESISTANT, UNRESISTED), (FORGET,))
        ],
        editors=editors_table(tables), verdicts=verdict_words(tables), has_published=len(paper) > 0,
    ).strip() + "\n"  # fmt: skip


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
