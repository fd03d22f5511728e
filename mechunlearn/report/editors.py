"""Which editor: what each one leaves when it edits the same components, is tuned alike and may do as much damage."""

from mechunlearn.report.markdown import Table
from mechunlearn.report.study_numbers import interval
from mechunlearn.study.arms import EDITORS_COMPARED
from mechunlearn.study.tables import StudyTables

# pandas has no complete types
# pyright: standard

SHOWN = ("forget", "multiple choice, forget", "asking, excess", "probing, excess", "relearning, excess", "KL",
         "perplexity ratio", "maintain")  # fmt: skip


def editors_table(tables: StudyTables) -> Table:
    """A row an arm of the presets that compare editors, least recovered first: verdict, D, and `SHOWN`; quick attacks.

    Arms that damage more than others cannot be told from better ones by D alone: KL and what is maintained stand
    beside it.
    """
    quick = tables.arms.loc[tables.arms["level"] == "quick"]
    compared = quick.loc[quick["arm"].isin(EDITORS_COMPARED), "preset"]
    verdicts = tables.verdicts.loc[(tables.verdicts["level"] == "quick") & tables.verdicts["preset"].isin(compared)]
    found = {(r["preset"], r["arm"], r["measure"]): interval(r) for r in quick.to_dict("records")}
    table = [["preset", "arm", "verdict", "strongest attack", "D", *SHOWN]]
    for row in verdicts.sort_values(["preset", "D"], kind="stable").to_dict("records"):
        numbers = [found.get((row["preset"], row["arm"], measure), "") for measure in SHOWN]
        table.append([row["preset"], row["arm"], row["word"], str(row["strongest"]), interval(row, "D"), *numbers])
    return table
