"""The verdict on models of known truth, in small: what `mechunlearn bench verdict --quick` does (some four minutes)."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from mechunlearn.cli import app


@pytest.mark.slow
def test_the_quick_bench_is_not_confidently_wrong_and_every_suppression_is_recovered(tmp_path):
    found = CliRunner().invoke(app, ["bench", "verdict", "--quick", "--out", str(tmp_path / "bench")])
    assert found.exit_code == 0, found.output
    verdicts = pd.read_csv(tmp_path / "bench/tables/verdicts.csv")
    whole = verdicts.loc[verdicts["share_of_facts"] == 1].set_index("case")
    decided = whole.loc[whole["word"].isin(["hidden", "removed"])]
    assert decided["right"].all()
    assert whole.loc["original", "word"] == "hidden"
    assert whole.loc["original", "still_expressed"]
    goals = pd.read_csv(tmp_path / "bench/tables/goals.csv").set_index("what")
    assert goals.loc["confidently wrong", "count"] == 0
    assert goals.loc["accepted suppressions recovered", "count"] == goals.loc["accepted suppressions recovered", "of"]
    power = pd.read_csv(tmp_path / "bench/tables/power.csv").set_index("attack")
    assert power.loc["relearning", "D"] > 0.1
    assert (tmp_path / "bench/tables/bench.html").stat().st_size > 10_000
