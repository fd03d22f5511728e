"""The study's verdicts: of every arm at each level, over all seeds, against what was known before any edit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.evidence import AttackEvidence, PositiveControl, evidence_by_attack
from mechunlearn.study.parts import LEVELS, Found, Part
from mechunlearn.verdict import Verdict, decide, demonstrate_power

# pandas has no complete types
# pyright: standard

DELTA = 0.1  # share of the knowledge that still counts as removed


def verdict_table(part: Part, found: Sequence[Found]) -> pd.DataFrame:
    """One verdict for each arm (and draw of it) at each level, over all seeds together.

    None for attacks with false labels, which cannot bring anything back.
    """
    groups: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        if not one.line.edited.false_labels:
            groups.setdefault((one.line.arm, one.line.level), []).append(one)
    null = "twin" if part.model.twin else "proxy"
    before = {
        edited: {"null": null, "delta": DELTA, **levels_before(groups["original", "quick"], edited=edited)}
        for edited in (False, True)
    }
    controls: dict[str, list[PositiveControl]] = {level: [] for level in LEVELS}
    for kind in part.model.controls:
        for level, shown in controls.items():
            own = groups[f"suppressed-{kind}", level]
            shown.append(demonstrate_power(kind, _evidence(own, null), accepted=accepted(own), **before[False]))
    rows = []
    for (arm, level), own in groups.items():
        if not arm.startswith("suppressed"):
            bounds: dict[str, Any] = before[bool(own[0].line.edited.blocks)]
            verdict = decide(_evidence(own, null), controls=controls[level], **bounds)
            rows.append(
                {"preset": part.study.name, "arm": arm, "level": level, "word": str(verdict), **_strongest(verdict)}
            )
    return pd.DataFrame(rows)


def levels_before(originals: Sequence[Found], *, edited: bool) -> dict[str, float]:
    """Mean P(true) of the hidden facts on the unedited model and on its null, as an edited one is asked.

    Args:
        edited: among the candidates without the wrong answer, as an edited model is attacked; else among all.
    """
    candidates = "without target" if edited else "all"
    sides = {"original": [one.edited for one in originals], "null_before": [one.null for one in originals]}
    return {
        name: float(np.mean([outcome.record["hidden_p_true"][candidates] for outcome in side]))
        for name, side in sides.items()
    }


def accepted(found: Sequence[Found]) -> bool:
    """Whether a positive control is suppressed, and only suppressed, under every seed; see `controls.acceptance`."""
    return not any(one.edited.record["acceptance"]["reason"] for one in found)


def _evidence(found: Sequence[Found], null: str) -> list[AttackEvidence]:
    edited = [result for one in found for result in one.edited.attacks]
    other = [result for one in found for result in one.null.attacks]
    return evidence_by_attack(edited, other, paired=null == "twin")


def _strongest(verdict: Verdict) -> dict[str, Any]:
    row = max(verdict.rows, key=lambda row: row.share)
    return {
        "strongest": row.name, "D": row.share, "lower": row.lower, "upper": row.upper, "n_facts": row.n_facts,
        "null": verdict.null, "reason": verdict.reason, "caveats": "; ".join(verdict.caveats),
    }  # fmt: skip
