"""The paper's claims, each put to the study's numbers: it holds, does not, or cannot be told here, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pandas as pd

from mechunlearn.study.arms import ALL_MLPS, LOOKUP, LOOKUP_PATHS, NONLOCALIZED, RANDOM_MLPS
from mechunlearn.study.tables import StudyTables

# pandas has no complete types
# pyright: standard

PAPERS_TASKS = {
    "sports-athletes-16": "athletes", "sports-athletes-64": "athletes", "sports-whole": "sport",
    "counterfact-16": "counterfact", "counterfact-64": "counterfact",
    "counterfact-sequential-4x16": "counterfact-sequential",
}  # fmt: skip
"""The paper's presets, with the task that its numbers are of."""
ALPHA = 0.05
FINISHED = 0.5  # mean P(injected answer) on the very prompts an edit was trained on, below which it is unfinished
OUTPUT_TRACING = ("attribution-patching", "attribution-patching-mlps", "causal-tracing", "causal-tracing-mlps")
CONTROLS = (RANDOM_MLPS, "random", ALL_MLPS, NONLOCALIZED)
AGAINST = (LOOKUP_PATHS, *OUTPUT_TRACING, *CONTROLS)
HOLDS, DOES_NOT, OPEN = "holds", "does not hold", "cannot be told here"
SAME_EDIT = "both arms chose the same components, so they are the same edit"
NO_TWIN = "there is no twin: what an attack brings back cannot be told from what it makes up"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim as differences of fact lookup from other arms: their sign, and on what."""

    name: str
    says: str
    measures: tuple[tuple[str, int], ...]
    """(measure, +1 if fact lookup should have more of it, -1 if less)."""


CLAIMS = (
    Claim(
        name="format generalization",
        says="an edit of the fact-lookup MLPs carries over to multiple choice, a format it was not trained on",
        measures=(("multiple choice, edit", 1), ("multiple choice, forget", -1)),
    ),
    Claim(
        name="relearning resistance",
        says="relearning on half of the forgotten facts brings back less of the other half",
        measures=(("relearning, excess", -1),),
    ),
    Claim(
        name="latent knowledge disruption",
        says="probes and the logit lens read less of the true answers inside the edited model",
        measures=(("probing, excess", -1), ("logit_lens, excess", -1)),
    ),
    Claim(
        name="fewer side effects",
        says="other facts are kept better",
        measures=(("maintain", 1), ("neighborhood", 1), ("elsewhere", 1), ("multiple choice, maintain", 1)),
    ),
)  # fmt: skip


def claim_table(tables: StudyTables) -> pd.DataFrame:
    """Every claim against every arm of the paper in every preset.

    "holds": the interval of the difference is on the claimed side of 0 and Holm's p is below .05, for one of the
    claim's measures at least and against none of them; "does not hold": the same on the other side; "cannot be told
    here": neither; or one of the edits is unfinished (mean P(injected answer) below `FINISHED`); or both arms are the
    same edit; or there is no twin to compare an attack with. An attack that was unhealthy under some seed decides
    nothing.
    """
    halfway, rows = unfinished(tables), []
    differences = tables.differences
    compared = differences.loc[(differences["reference"] == LOOKUP) & differences["arm"].isin(AGAINST)]
    for claim in CLAIMS:
        groups: Any = compared.groupby(["preset", "level", "arm"], sort=False)  # pandas has no complete types
        for (preset, level, arm), group in groups:
            found = {row["measure"]: row for row in group.to_dict("records")}
            told = [(found[m], sign) for m, sign in claim.measures if m in found]
            attacks = {m: m.partition(",")[0] for m, _ in claim.measures}
            bad = [a for a in attacks.values() if n_unhealthy(tables, preset, level, (arm, LOOKUP), a)]
            if not told and not any(attack in found for attack in attacks.values()):
                continue  # not measured at this level
            short = [who for who in (LOOKUP, arm) if (preset, who) in halfway]
            word, why = (
                (OPEN, NO_TWIN) if not told
                else (OPEN, f"unfinished at its end: {', '.join(short)}") if short
                else _word([pair for pair in told if attacks[pair[0]["measure"]] not in bad], bad)
            )  # fmt: skip
            rows.append((claim.name, preset, level, arm, word, why))
    return pd.DataFrame(rows, columns=pd.Index(["claim", "preset", "level", "against", "word", "why"]))


def unfinished(tables: StudyTables) -> set[tuple[str, str]]:
    """(preset, arm) of the edits that do not give the injected answers, on the prompts they were trained on."""
    edited = tables.arms.loc[(tables.arms["measure"] == "edit") & (tables.arms["level"] == "quick")]
    short = edited.loc[(edited["mean"] < FINISHED) & ~edited["arm"].str.startswith(("original", "suppressed"))]
    return set(zip(short["preset"], short["arm"], strict=True))


def n_unhealthy(tables: StudyTables, preset: str, level: str, arms: Sequence[str], attack: str) -> int:
    """Under how many seeds an attack was unhealthy on one of the arms or its twin, summed over the arms."""
    own = tables.arms.loc[
        (tables.arms["preset"] == preset) & (tables.arms["level"] == level) & tables.arms["arm"].isin(arms)
        & (tables.arms["measure"] == f"{attack}, healthy")
    ]  # fmt: skip
    return round(float(((1 - own["mean"]) * own["n_seeds"]).sum()))


def _word(told: Sequence[tuple[dict[str, float], int]], bad: Sequence[str]) -> tuple[str, str]:
    numbers = "; ".join(
        f"{row['measure']} {row['difference']:+.2f} [{row['lower']:+.2f}, {row['upper']:+.2f}]" for row, _ in told
    )
    note = f"; not counted, unhealthy: {', '.join(dict.fromkeys(bad))}" if bad else ""
    if not told:
        return OPEN, f"every attack was unhealthy under some seed: {', '.join(dict.fromkeys(bad))}"
    if all(row["same"] for row, _ in told):
        return OPEN, SAME_EDIT
    signs = [clear_sign(row, row["p_holm"]) * sign for row, sign in told]
    if any(s > 0 for s in signs) and not any(s < 0 for s in signs):
        return HOLDS, numbers + note
    if any(s < 0 for s in signs) and not any(s > 0 for s in signs):
        return DOES_NOT, numbers + note
    return OPEN, numbers + note


def clear_sign(row: Mapping[str, float], p: float) -> int:
    """The sign of a difference that is told from 0: its interval excludes 0 and its corrected p is below `ALPHA`."""
    return int(p < ALPHA) * (int(row["lower"] > 0) - int(row["upper"] < 0))


def published() -> pd.DataFrame:
    """The paper's numbers, recomputed from its authors' raw results: task, arm, measure, value, cells, source."""
    with (files("mechunlearn.study") / "published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def beside_published(tables: StudyTables) -> pd.DataFrame:
    """Our means with their intervals beside the published number of the same task, arm and measure.

    The paper's fact lookup is by probing for sports and by path patching for CounterFact; the other one has no number.
    Its relearning and
    probing are P or accuracy of the true answer after the attack, ours P(true | candidates without the injected one):
    compare the order of arms, not the levels.
    """
    paper = published()
    quick = tables.arms.loc[tables.arms["level"] == "quick"]
    by_probing = quick["preset"].str.startswith("sports")
    is_lookup = (by_probing & (quick["arm"] == LOOKUP)) | (~by_probing & (quick["arm"] == LOOKUP_PATHS))
    ours = quick.assign(task=quick["preset"].map(PAPERS_TASKS), paper_arm=quick["arm"].where(~is_lookup, "lookup"))
    return ours.merge(
        paper.rename(columns={"arm": "paper_arm", "value": "published"}), on=["task", "paper_arm", "measure"]
    ).loc[:, ["preset", "arm", "measure", "mean", "lower", "upper", "published", "cells", "source"]]
