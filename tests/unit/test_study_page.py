from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mechunlearn.report.beyond import beyond_table
from mechunlearn.report.editors import SHOWN, editors_table
from mechunlearn.report.study import claims_figure
from mechunlearn.report.study_numbers import markdown, same_edits
from mechunlearn.report.study_page import study_page, verdict
from mechunlearn.study.arms import LOOKUP, RESISTANT, UNRESISTED
from mechunlearn.study.claims import CLAIMS, DOES_NOT, HOLDS, OPEN, SAME_EDIT, claim_table
from mechunlearn.study.tables import StudyTables, arm_table, difference_table

PRESET = "sports-athletes-16"
VALUES = {
    "multiple choice, edit": {LOOKUP: 0.9, "random-mlps": 0.4, "all-mlps": 0.9, RESISTANT: 0.2},
    "relearning": {LOOKUP: 0.6, "random-mlps": 0.3, "all-mlps": 0.6, RESISTANT: 0.2, UNRESISTED: 0.4},
    "relearning, excess": {LOOKUP: 0.5, "random-mlps": 0.2, "all-mlps": 0.5, RESISTANT: 0.1, UNRESISTED: 0.3},
    "KL": {LOOKUP: 0.02, "random-mlps": 0.03, "all-mlps": 0.02, RESISTANT: 0.01},
}


@pytest.fixture
def tables() -> StudyTables:
    rows = pd.DataFrame(
        [
            (PRESET, arm, seed, "quick", "" if measure == "KL" else f"{seed}-{i}", measure, mean + 0.011 * i)
            for measure, arms in VALUES.items()
            for arm, mean in arms.items()
            for seed in range(5)
            for i in range(1 if measure == "KL" else 4)
        ],
        columns=pd.Index(["preset", "arm", "seed", "level", "fact", "measure", "value"]),
    )
    components = pd.DataFrame(
        [(PRESET, arm, seed, 0, "m1 m2" if arm != "random-mlps#0" or seed else "m4 m5", 1.0 if seed else 0.5)
         for arm in (LOOKUP, "random-mlps#0", "all-mlps", RESISTANT) for seed in range(5)],
        columns=pd.Index(["preset", "arm", "seed", "block", "components", "of fact lookup"]),
    )  # fmt: skip
    draws = pd.DataFrame(
        [(PRESET, seed, "random-mlps#0", "relearning, excess", 0.1 * seed) for seed in range(5)],
        columns=pd.Index(["preset", "seed", "draw", "measure", "value"]),
    )
    verdicts = pd.DataFrame(
        [{"preset": PRESET, "arm": LOOKUP, "level": "quick", "word": "hidden", "strongest": "relearning", "D": 0.5,
          "lower": 0.4, "upper": 0.6}]
    )  # fmt: skip
    return StudyTables(
        arms=arm_table(rows), verdicts=verdicts,
        differences=pd.concat([difference_table(rows), difference_table(rows, UNRESISTED)], ignore_index=True),
        tuning=pd.DataFrame({"preset": []}), components=components, draws=draws,
    )  # fmt: skip


def cells(page: str, start: str) -> list[str]:
    """The cells of the one line that starts so."""
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_number_on_the_page_is_in_the_tables_and_the_papers_stands_beside_it(tables):
    page = study_page(tables, claim_table(tables))
    chosen = tables.arms.set_index(["arm", "measure"])
    for arm, paper in ((LOOKUP, "0.86"), ("random-mlps", "0.63")):
        row = chosen.loc[arm, "multiple choice, edit"]
        expected = f"{row['mean']:.2f} [{row['lower']:.2f}, {row['upper']:.2f}] (paper {paper})"
        assert f"| {arm} | {expected} |" in page
    assert "| relearning, excess | 5 | 0.00 | 0.40 |" in page  # the draws
    assert "(Nothing was measured.)" in page  # no false labels here
    assert cells(page, f"| {PRESET} | {LOOKUP} | quick |") == [PRESET, LOOKUP, "quick", "hidden", "relearning",
                                                               "0.50 [0.40, 0.60]"]  # fmt: skip


def test_a_page_of_saved_tables_is_the_page(tables, tmp_path):
    tables.save(tmp_path)
    loaded = StudyTables.load(tmp_path)
    assert study_page(loaded, claim_table(loaded)) == study_page(tables, claim_table(tables))


def test_the_resistant_edit_is_ahead_where_less_comes_back(tables):
    first, second = beyond_table(tables, "quick")[1:]
    for row, reference, difference in ((first, LOOKUP, "0.40 ["), (second, UNRESISTED, "0.20 [")):
        assert row[:3] == [PRESET, "relearning", reference]
        assert row[3].startswith(difference)
        assert float(row[5]) < 0.05
        assert row[-1] == "less"
    assert len(beyond_table(tables, "standard")) == 1


def test_the_resistant_edit_is_not_ahead_where_an_attack_was_unhealthy(tables):
    ill = {"preset": PRESET, "arm": RESISTANT, "level": "quick", "measure": "relearning, healthy", "mean": 0.8,
           "lower": 0.0, "upper": 1.0, "n_facts": 5, "n_seeds": 5}  # fmt: skip
    found = replace(tables, arms=pd.concat([tables.arms, pd.DataFrame([ill])], ignore_index=True))
    assert [row[-4:] for row in beyond_table(found, "quick")[1:]] == [["1", "20", "5", "open"]] * 2


def test_editors_are_ranked_by_what_comes_back_in_presets_that_compare_them(tables):
    assert len(editors_table(tables)) == 1  # arms of places, none of other editors
    line = tables.verdicts.iloc[0].to_dict()
    verdicts = [line | {"preset": "p2", "arm": arm, "D": d} for arm, d in ((LOOKUP, 0.5), ("memit", 0.2))]
    verdicts += [line, line | {"preset": "p2", "arm": "npo", "level": "standard"}]
    arms = [
        tables.arms.loc[tables.arms["arm"] == LOOKUP].assign(preset="p2", arm=arm, mean=mean)
        for arm, mean in ((LOOKUP, 0.6), ("memit", 0.3))
    ]
    both = replace(tables, arms=pd.concat([tables.arms, *arms]), verdicts=pd.DataFrame(verdicts))
    first, second = editors_table(both)[1:]
    assert first[:5] == ["p2", "memit", "hidden", "relearning", "0.20 [0.40, 0.60]"]
    assert second[1] == LOOKUP
    assert first[5 + SHOWN.index("relearning, excess")].startswith("0.30 [")
    assert "" in first  # what the preset did not measure
    assert "| p2 | memit | hidden |" in study_page(both, claim_table(both))


def test_a_preset_without_the_papers_arms_has_a_page(tables):
    arms = tables.arms.loc[tables.arms["arm"].isin((LOOKUP, RESISTANT))]
    components = tables.components.loc[tables.components["arm"] == LOOKUP]
    alone = replace(tables, arms=arms, components=components, draws=tables.draws.iloc[:0])
    page = study_page(alone, claim_table(alone))
    assert "Presets: none with the paper's arms; 5 seeds." in page
    assert len(claims_figure(claim_table(alone)).layout.annotations) > 0


def test_presets_with_other_arms_share_a_page(tables):
    other = tables.arms.loc[tables.arms["arm"].isin((LOOKUP, "all-mlps"))].assign(preset="p2")
    components = tables.components.loc[tables.components["arm"] == LOOKUP].assign(preset="p2")
    both = replace(tables, arms=pd.concat([tables.arms, other]), components=pd.concat([tables.components, components]))
    assert same_edits(both)[1:] == [["random-mlps", "80%, 90%", ""], ["all-mlps", "100%, 90%", ""]]
    page = study_page(both, claim_table(both))
    assert (
        len([line for line in page.splitlines() if line.startswith("| all-mlps |") and line.count("0.92 [") == 2]) == 1
    )


def test_arms_with_fact_lookups_components_are_named(tables):
    assert same_edits(tables)[1:] == [["random-mlps", "80%, 90%"], ["all-mlps", "100%, 90%"]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([HOLDS, HOLDS, OPEN], HOLDS),
        ([HOLDS, OPEN, OPEN], OPEN),  # not most of them
        ([HOLDS, "same", "same"], HOLDS),  # these do not count
        ([HOLDS, HOLDS, DOES_NOT], OPEN),
        ([DOES_NOT, OPEN, OPEN], DOES_NOT),
        ([OPEN, "same"], OPEN),
    ],
)
def test_one_word_for_a_claim(words, expected):
    rows = [
        (
            CLAIMS[0].name,
            PRESET,
            "quick",
            f"arm {i}",
            OPEN if word == "same" else word,
            SAME_EDIT if word == "same" else "",
        )
        for i, word in enumerate(words)
    ]
    claims = pd.DataFrame(rows, columns=pd.Index(["claim", "preset", "level", "against", "word", "why"]))
    assert verdict(claims, CLAIMS[0]).startswith(f"{expected} ({len(words)} comparisons")


def test_tables_are_markdown():
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert markdown([["a", "b"]]) == "(Nothing was measured.)"


def test_numbers_of_an_unfinished_edit_carry_its_sign(tables):
    arms = [
        {"preset": PRESET, "arm": arm, "level": "quick", "measure": "edit", "mean": mean, "lower": 0, "upper": 1,
         "n_facts": 4, "n_seeds": 5}
        for arm, mean in ((LOOKUP, 0.9), ("random-mlps", 0.2))
    ]  # fmt: skip
    edited = replace(tables, arms=pd.concat([tables.arms, pd.DataFrame(arms)], ignore_index=True))
    page = study_page(edited, claim_table(edited))
    for arm, signs in (("random-mlps", 1), (LOOKUP, 0)):
        lines = [line for line in page.splitlines() if line.startswith(f"| {arm} |") and "paper" in line]
        assert lines
        assert all(line.count("†") == signs for line in lines)


def test_the_committed_page_is_made_of_the_committed_tables():
    figures = Path(__file__).parents[2] / "figures"
    readme = (figures / "README.md").read_text(encoding="utf-8")
    tables = StudyTables.load(figures / "data" / "study")
    assert readme.partition("<!-- study.md -->\n")[2] == study_page(tables, claim_table(tables))
