"""The study's tables: every arm with intervals, fact lookup against every other arm, verdicts, tuning, components."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.comparison import holm, paired_p_value
from mechunlearn.experiment import process_pool
from mechunlearn.statistics import Interval, hierarchical_interval, seed_fact_table, seed_interval
from mechunlearn.study.arms import LOOKUP, RANDOM_MLPS, UNRESISTED, arm_named
from mechunlearn.study.jobs import is_done
from mechunlearn.study.parts import Part, lines, trials, tuned
from mechunlearn.study.rows import study_rows
from mechunlearn.study.tuner import score
from mechunlearn.study.verdicts import verdict_table

# pandas has no complete types
# pyright: standard

UNBOUNDED = ("perplexity ratio", "KL", "damage where watched")


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyTables:
    """Everything the figures and claims are made of."""

    arms: pd.DataFrame
    """preset, arm, level, measure, mean, lower, upper, n_facts, n_seeds."""
    differences: pd.DataFrame
    """preset, level, measure, reference, arm: the reference (fact lookup by probing, or `UNRESISTED`) minus that arm on
    the same facts, with p and Holm's p."""
    verdicts: pd.DataFrame
    """preset, arm, level, word, reason, strongest attack with D and its bounds; all seeds together."""
    tuning: pd.DataFrame
    """preset, arm, the options that are tuned, what was scored, whether the budget scaled the edit down, chosen."""
    components: pd.DataFrame
    """preset, arm, seed, block, components, share of them that fact lookup has, too."""
    draws: pd.DataFrame
    """preset, seed, draw of random MLPs, measure, value, components: how much one draw differs from another."""

    def save(self, folder: Path) -> None:
        """One csv each."""
        for name, frame in self.__dict__.items():
            frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.4f")

    @classmethod
    def load(cls, folder: Path) -> "StudyTables":
        """Read back what `save` wrote, with four digits."""
        return cls(**{name: pd.read_csv(folder / f"{name}.csv") for name in cls.__dataclass_fields__})


def study_tables(parts: Sequence[Part], *, workers: int = 1) -> StudyTables:
    """Read the finished jobs of the parts; a part of which some are missing is left out as a whole.

    Args:
        workers: processes that the parts are shared out to; many thousand files are read.

    Raises:
        ValueError: no part is finished.
    """
    done = [part for part in parts if is_finished(part)]
    if not done:
        names = ", ".join(part.study.name for part in parts)
        raise ValueError(
            f"study: none of {names} is finished in {parts[0].home.parent}; `mechunlearn study run NAME` (same "
            "--seeds) goes on where it stopped, `study report NAME` reports another one"
        )
    with process_pool(min(workers, len(done))) as pool:
        tables = list((map if pool is None else pool.map)(part_tables, done))
    frames = {name: [getattr(one, name) for one in tables] for name in StudyTables.__dataclass_fields__}
    return StudyTables(
        **{name: pd.concat([one for one in own if len(one)] or own, ignore_index=True) for name, own in frames.items()}
    )


def part_tables(part: Part) -> StudyTables:
    """The tables of one preset."""
    found = part.found()
    rows: Any = study_rows(found)
    drawn = _draws(rows)
    rows = rows.groupby([c for c in rows.columns if c not in ("draw", "value")], sort=False, as_index=False)[
        "value"
    ].mean()
    return StudyTables(
        arms=arm_table(rows), differences=pd.concat([difference_table(rows), difference_table(rows, UNRESISTED)]),
        verdicts=verdict_table(part, found), tuning=_tuning(part), components=(components := _components(part)),
        draws=drawn.merge(components.rename(columns={"arm": "draw"}), on=["preset", "draw", "seed"]),
    )  # fmt: skip


def is_finished(part: Part) -> bool:
    """Whether every job of a preset is done."""
    try:
        jobs = [job for line in lines(part, tuned(part)) for job in (line.edited, line.null)]
    except FileNotFoundError:  # not even located or tuned
        return False
    return all(is_done(job, part.home) for job in jobs)


def interval_of(rows: pd.DataFrame) -> Interval:
    """Mean with its 95% interval over seeds and facts; over seeds alone for what is about no single fact."""
    if not rows["fact"].iloc[0]:
        return seed_interval(rows["value"].to_numpy())
    return hierarchical_interval(seed_fact_table(list(rows["seed"]), list(rows["fact"]), rows["value"].to_numpy()))


def arm_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every arm and measure; rows hold every (seed, fact) once. Intervals end where the measure itself does."""
    table = []
    groups: Any = rows.groupby(["preset", "arm", "level", "measure"], sort=False)  # pandas has no complete types
    for key, group in groups:
        found, (least, most) = interval_of(group), limits(key[-1])
        bounds = max(found.lower, least), min(found.upper, most)
        table.append((*key, found.value, *bounds, found.n, group["seed"].nunique()))
    columns = ["preset", "arm", "level", "measure", "mean", "lower", "upper", "n_facts", "n_seeds"]
    return pd.DataFrame(table, columns=pd.Index(columns))


def limits(measure: str) -> tuple[float, float]:
    """The least and the largest value that a measure can take."""
    if measure.endswith(", excess"):
        return -1.0, 1.0
    return 0.0, math.inf if measure in UNBOUNDED else 1.0


def difference_table(rows: pd.DataFrame, reference: str = LOOKUP) -> pd.DataFrame:
    """The reference arm minus every other edit, paired by seed and fact.

    p: arms exchanged fact by fact (means over seeds; NaN for a single fact); p_holm: corrected for the arms of one
    preset, level and measure.
    """
    table: list[dict[str, Any]] = []
    groups: Any = rows.groupby(["preset", "level", "measure"], sort=False)
    for key, group in groups:
        wide = group.pivot_table(index=["seed", "fact"], columns="arm", values="value", sort=False)
        if reference not in wide.columns or not wide.index.get_level_values("fact")[0]:
            continue
        compared: list[dict[str, Any]] = []
        for arm in (
            name for name in wide.columns if name != reference and not name.startswith(("original", "suppressed"))
        ):
            both = wide[[reference, arm]].dropna()
            change = (both[reference] - both[arm]).rename("value").reset_index()
            found = interval_of(change)
            by_fact = both.groupby("fact").mean()
            p = paired_p_value(by_fact[reference].to_numpy(), by_fact[arm].to_numpy()) if len(by_fact) > 1 else np.nan
            compared.append(
                dict(zip(("preset", "level", "measure"), key, strict=True))
                | {"reference": reference, "arm": arm, "difference": found.value, "lower": found.lower,
                   "upper": found.upper, "p": p, "n_facts": found.n, "n_seeds": change["seed"].nunique(),
                   "same": bool((change["value"] == 0).all())}
            )  # fmt: skip
        tested = [row for row in compared if not math.isnan(row["p"])]
        corrected = dict(zip((row["arm"] for row in tested), holm([row["p"] for row in tested]), strict=True))
        table += [row | {"p_holm": float(corrected.get(row["arm"], math.nan))} for row in compared]
    columns = ["preset", "level", "measure", "reference", "arm", "difference", "lower", "upper", "p", "n_facts",
               "n_seeds", "same", "p_holm"]  # fmt: skip
    return pd.DataFrame(table, columns=pd.Index(columns))


def _tuning(part: Part) -> pd.DataFrame:
    best = tuned(part)
    rows = []
    for arm, tried in trials(part).items():
        for options, job in tried:
            record = part.outcome(job).record
            damage = max((note["damage"] for note in record["notes"] if "damage" in note), default=np.nan)
            beyond = any(note.get("brought_back", False) for note in record["notes"])
            rows.append(
                {"preset": part.study.name, "arm": arm, **options, **record["score"],
                 "score": score(arm_named(arm), record["score"]), "damage": damage,
                 "brought back to the budget": beyond, "chosen": options == best[arm]}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _draws(rows: pd.DataFrame) -> pd.DataFrame:
    """Each draw of random MLPs by itself."""
    own = rows.loc[(rows["arm"] == RANDOM_MLPS) & (rows["level"] == "quick")]
    own = own.assign(draw=RANDOM_MLPS + "#" + own["draw"].astype(str))
    return own.groupby(["preset", "seed", "draw", "measure"], sort=False, as_index=False)["value"].mean()


def _components(part: Part) -> pd.DataFrame:
    rows = []
    for seed in part.seeds:
        located: Mapping[str, Sequence[Sequence[str]]] = part.located(seed)
        for arm, blocks in located.items():
            for block, components in enumerate(blocks):
                lookup = set(located[LOOKUP][block])
                rows.append(
                    {"preset": part.study.name, "arm": arm, "seed": seed, "block": block,
                     "components": " ".join(components),
                     "of fact lookup": len(lookup & set(components)) / len(lookup)}
                )  # fmt: skip
    return pd.DataFrame(rows)
