"""Beyond the paper: what other edits of the same components leave to bring back, beside the paper's."""

from typing import Any

from mechunlearn.comparison import holm
from mechunlearn.report.markdown import Table
from mechunlearn.report.study_numbers import interval
from mechunlearn.study.arms import RESISTANT
from mechunlearn.study.claims import clear_sign, n_unhealthy
from mechunlearn.study.tables import StudyTables

# pandas has no complete types
# pyright: standard


def beyond_table(tables: StudyTables, level: str, arm: str = RESISTANT) -> Table:
    """What an edit of ours leaves less than another one, attack by attack; above 0 it leaves less.

    Excess over the equally edited and attacked twin, and beside it on the edited model alone. Holm's p is corrected for
    the attacks of one preset, level and reference. "less" or "more" is said where the interval of the excess excludes
    0, Holm's p is below .05, and the attack was healthy under every seed, on all sides.
    """
    table = [["preset", "attack", "minus " + arm, "excess", "edited model alone", "Holm's p", "unhealthy seeds",
              "facts", "seeds", "comes back"]]  # fmt: skip
    found = tables.differences
    found = found.loc[(found["arm"] == arm) & (found["level"] == level)]
    groups: Any = found.groupby(["preset", "reference"], sort=False)  # pandas has no complete types
    for (preset, reference), group in groups:
        by_measure = {row["measure"]: row for row in group.to_dict("records")}
        excesses = [row for measure, row in by_measure.items() if measure.endswith(", excess")]
        for row, p in zip(excesses, holm([row["p"] for row in excesses]), strict=True):
            attack = row["measure"].removesuffix(", excess")
            ill = n_unhealthy(tables, preset, level, (reference, arm), attack)
            word = ("open", "less", "more")[0 if ill else clear_sign(row, p)]
            table.append(
                [preset, attack, reference, interval(row, "difference"), interval(by_measure[attack], "difference"),
                 f"{p:.4f}", str(ill), str(row["n_facts"]), str(row["n_seeds"]), word]
            )  # fmt: skip
    return table
