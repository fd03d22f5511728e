"""The study's verdicts: of every arm at each level, over all seeds, against what was known before any edit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.evidence import AttackEvidence, PositiveControl, evidence_by_attack
from mechunlearn.study.jobs import Outcome
from mechunlearn.study.parts import LEVELS, Line, Part
from mechunlearn.verdict import Verdict, decide, demonstrate_power

# pandas has no complete types
# pyright: standard

DELTA = 0.1  # share of the knowledge that still counts as removed
Pairs = Sequence[tuple[Outcome, Outcome]]
"""What was found on the edited model and on its null, seed by seed."""


def verdict_table(part: Part, found: Sequence[Line]) -> pd.DataFrame:
    """One verdict for each arm (and draw of it) at each level, over all seeds together.

    None for attacks with false labels, which cannot bring anything back.
    """
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        if not line.edited.false_labels:
            groups.setdefault((line.arm, line.level), []).append(line)
    outcomes: dict[tuple[str, str], Pairs] = {
        key: [
            (Outcome.load(part.home / line.edited.digest), Outcome.load(part.home / line.null.digest)) for line in own
        ]
        for key, own in groups.items()
    }
    null = "twin" if part.model.twin else "proxy"
    before = {
        edited: {"null": null, "delta": DELTA, **levels_before(outcomes["original", "quick"], edited=edited)}
        for edited in (False, True)
    }
    controls: dict[str, list[PositiveControl]] = {level: [] for level in LEVELS}
    for kind in part.model.controls:
        for level, shown in controls.items():
            pairs = outcomes[f"suppressed-{kind}", level]
            evidence = _evidence(pairs, null)
            shown.append(demonstrate_power(kind, evidence, accepted=accepted(pairs), **before[False]))
    rows = []
    for (arm, level), pairs in outcomes.items():
        if not arm.startswith("suppressed"):
            bounds: dict[str, Any] = before[bool(groups[arm, level][0].edited.blocks)]
            verdict = decide(_evidence(pairs, null), controls=controls[level], **bounds)
            rows.append(
                {"preset": part.study.name, "arm": arm, "level": level, "word": str(verdict), **_strongest(verdict)}
            )
    return pd.DataFrame(rows)


def levels_before(originals: Pairs, *, edited: bool) -> dict[str, float]:
    """Mean P(true) of the hidden facts on the unedited model and on its null, as an edited one is asked.

    Args:
        edited: among the candidates without the wrong answer, as an edited model is attacked; else among all.
    """
    candidates = "without target" if edited else "all"
    levels = ([pair[i].record["hidden_p_true"][candidates] for pair in originals] for i in (0, 1))
    return dict(zip(("original", "null_before"), (float(np.mean(level)) for level in levels), strict=True))


def accepted(pairs: Pairs) -> bool:
    """Whether a positive control is suppressed, and only suppressed, under every seed; see `controls.acceptance`."""
    return not any(edited.record["acceptance"]["reason"] for edited, _ in pairs)


def _evidence(pairs: Pairs, null: str) -> list[AttackEvidence]:
    edited, other = ([result for pair in pairs for result in pair[i].attacks] for i in (0, 1))
    return evidence_by_attack(edited, other, paired=null == "twin")


def _strongest(verdict: Verdict) -> dict[str, Any]:
    row = max(verdict.rows, key=lambda row: row.share)
    return {
        "strongest": row.name, "D": row.share, "lower": row.lower, "upper": row.upper, "n_facts": row.n_facts,
        "null": verdict.null, "reason": verdict.reason, "caveats": "; ".join(verdict.caveats),
    }  # fmt: skip
