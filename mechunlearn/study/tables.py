"""The study's tables: every arm with intervals, fact lookup against every other arm, verdicts, tuning, components."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.comparison import holm, paired_p_value
from mechunlearn.evidence import PositiveControl, evidence_by_attack
from mechunlearn.statistics import Interval, hierarchical_interval, seed_fact_table, seed_interval
from mechunlearn.study.arms import LOOKUP, RANDOM_MLPS
from mechunlearn.study.jobs import Outcome
from mechunlearn.study.rows import study_rows
from mechunlearn.study.run import Line, Part, lines, trials, tuned
from mechunlearn.verdict import Verdict, decide, demonstrate_power

# pandas has no complete types
# pyright: standard

DELTA = 0.1  # share of the knowledge that still counts as removed


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyTables:
    """Everything the figures and claims are made of."""

    arms: pd.DataFrame
    """preset, arm, level, measure, mean, lower, upper, n_facts, n_seeds."""
    differences: pd.DataFrame
    """preset, level, measure, arm: fact lookup (probing) minus that arm on the same facts, with p and Holm's p."""
    verdicts: pd.DataFrame
    """preset, arm, level, word, reason, strongest attack with D and its bounds; all seeds together."""
    tuning: pd.DataFrame
    """preset, arm, learning_rate, inject_weight, what was scored, chosen."""
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


def study_tables(parts: Sequence[Part]) -> StudyTables:
    """Read the finished jobs of the parts; a part of which some are missing is left out as a whole.

    Raises:
        ValueError: no part is finished.
    """
    done = [part for part in parts if is_finished(part)]
    if not done:
        raise ValueError("study: no preset is finished; run `mechunlearn study run` first, it goes on where it stopped")
    found = {part.study.name: lines(part, tuned(part)) for part in done}
    rows: Any = pd.concat([study_rows(found[part.study.name], part.home) for part in done], ignore_index=True)
    drawn = _draws(rows)
    rows = rows.groupby([c for c in rows.columns if c not in ("draw", "value")], sort=False, as_index=False)[
        "value"
    ].mean()
    return StudyTables(
        arms=arm_table(rows), differences=difference_table(rows),
        verdicts=pd.concat([_verdicts(part, found[part.study.name]) for part in done], ignore_index=True),
        tuning=pd.concat([_tuning(part) for part in done], ignore_index=True),
        components=(components := pd.concat([_components(part) for part in done], ignore_index=True)),
        draws=drawn.merge(components.rename(columns={"arm": "draw"}), on=["preset", "draw", "seed"]),
    )  # fmt: skip


def is_finished(part: Part) -> bool:
    """Whether every job of a preset is done."""
    try:
        wanted = [job for tried in trials(part).values() for _, job in tried]
        if not all((part.home / job.digest / "record.json").is_file() for job in wanted):
            return False
        jobs = [job for line in lines(part, tuned(part)) for job in (line.edited, line.null)]
    except FileNotFoundError:  # not even located
        return False
    return all((part.home / job.digest / "record.json").is_file() for job in jobs)


def interval_of(rows: pd.DataFrame) -> Interval:
    """Mean with its 95% interval over seeds and facts; over seeds alone for what is about no single fact."""
    if not rows["fact"].iloc[0]:
        return seed_interval(rows["value"].to_numpy())
    return hierarchical_interval(seed_fact_table(list(rows["seed"]), list(rows["fact"]), rows["value"].to_numpy()))


def arm_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every arm and measure; rows hold every (seed, fact) once."""
    table = []
    groups: Any = rows.groupby(["preset", "arm", "level", "measure"], sort=False)  # pandas has no complete types
    for key, group in groups:
        found = interval_of(group)
        table.append((*key, found.value, found.lower, found.upper, found.n, group["seed"].nunique()))
    columns = ["preset", "arm", "level", "measure", "mean", "lower", "upper", "n_facts", "n_seeds"]
    return pd.DataFrame(table, columns=pd.Index(columns))


def difference_table(rows: pd.DataFrame, reference: str = LOOKUP) -> pd.DataFrame:
    """The reference arm minus every other edit, paired by seed and fact.

    p: arms exchanged fact by fact (means over seeds); p_holm: corrected for the arms of one preset, level and measure.
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
                | {"arm": arm, "difference": found.value, "lower": found.lower, "upper": found.upper, "p": p,
                   "n_facts": found.n, "n_seeds": change["seed"].nunique(), "same": bool((change["value"] == 0).all())}
            )  # fmt: skip
        for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
            table.append(row | {"p_holm": float(p)})
    return pd.DataFrame(table)


def _verdicts(part: Part, found: Sequence[Line]) -> pd.DataFrame:
    """One verdict an arm and level, over all seeds (and the first draw) together."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        groups.setdefault((line.arm, line.level), []).append(line)
    outcomes = {key: [_both(part, line) for line in group] for key, group in groups.items()}
    before = outcomes["original", "quick"]
    null = "twin" if part.model.twin else "proxy"
    bounds: dict[str, Any] = {
        "original": float(np.mean([u.record["hidden_p_true"] for u, _ in before])),
        "null_before": float(np.mean([n.record["hidden_p_true"] for _, n in before])), "null": null, "delta": DELTA,
    }  # fmt: skip
    controls: dict[str, list[PositiveControl]] = {"quick": [], "standard": []}
    for kind in part.model.controls:
        for level in ("quick", "standard"):
            pairs = outcomes[f"suppressed-{kind}", level]
            accepted = all(not _reason(u) for u, _ in pairs)
            evidence = _evidence(pairs, null)
            controls[level].append(demonstrate_power(kind, evidence, accepted=accepted, **bounds))
    rows = []
    for (arm, level), pairs in outcomes.items():
        if arm.startswith("suppressed"):
            continue
        verdict = decide(_evidence(pairs, null), controls=controls[level], **bounds)
        rows.append({"preset": part.study.name, "arm": arm, "level": level, "word": str(verdict)} | _strongest(verdict))
    return pd.DataFrame(rows)


def _both(part: Part, line: Line) -> tuple[Outcome, Outcome]:
    edited, null = (Outcome.load(part.home / job.digest) for job in (line.edited, line.null))
    return edited, null


def _reason(outcome: Outcome) -> str:
    return str((outcome.record.get("acceptance") or {}).get("reason", ""))


def _evidence(pairs: Sequence[tuple[Outcome, Outcome]], null: str) -> list[Any]:
    edited, other = ([result for pair in pairs for result in pair[i].attacks] for i in (0, 1))
    return evidence_by_attack(edited, other, paired=null == "twin")


def _strongest(verdict: Verdict) -> dict[str, Any]:
    row = max(verdict.rows, key=lambda row: row.share)
    return {
        "strongest": row.name, "D": row.share, "lower": row.lower, "upper": row.upper, "n_facts": row.n_facts,
        "null": verdict.null, "reason": verdict.reason, "caveats": "; ".join(verdict.caveats),
    }  # fmt: skip


def _tuning(part: Part) -> pd.DataFrame:
    best = tuned(part)
    rows = []
    for arm, tried in trials(part).items():
        for options, job in tried:
            record = Outcome.load(part.home / job.digest).record
            damage = max((note["damage"] for note in record["notes"]), default=np.nan)
            stopped = any(note["stopped_at"] is not None for note in record["notes"])
            rows.append(
                {"preset": part.study.name, "arm": arm, **options, **record["score"], "damage": damage,
                 "stopped by the budget": stopped, "chosen": options == best[arm]}
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
