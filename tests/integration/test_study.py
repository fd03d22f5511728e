"""The quick study from its command to its tables; slow: pytest -m slow tests/integration/test_study.py"""

import pandas as pd
import pytest
from typer.testing import CliRunner

from mechunlearn.cli import app

pytestmark = pytest.mark.slow


def test_the_quick_study_runs_goes_on_and_reports(tmp_path):
    out = tmp_path / "study"
    first = CliRunner().invoke(app, ["study", "run", "--quick", "--out", str(out)])
    assert first.exit_code == 0, first.output
    tables = {path.stem: pd.read_csv(path) for path in (out / "tables").glob("*.csv")}
    arms = tables["arms"].set_index(["arm", "level", "measure"])
    assert arms.loc[("lookup-probe", "quick", "edit"), "mean"] > arms.loc[("original", "quick", "edit"), "mean"]
    assert arms.loc[("original", "quick", "forget"), "mean"] > 0.8
    assert set(tables["verdicts"]["word"]) <= {
        "hidden",
        "hidden (still expressed)",
        "removed",
        "inconclusive",
        "invalid",
    }
    assert tables["tuning"].groupby("arm")["chosen"].sum().eq(1).all()
    jobs = {path: path.stat().st_mtime_ns for path in (out / "jobs").glob("*/record.json")}
    lost = sorted(jobs)[0]
    lost.unlink()
    again = CliRunner().invoke(app, ["study", "run", "--quick", "--out", str(out)])
    assert again.exit_code == 0, again.output
    now = {path: path.stat().st_mtime_ns for path in (out / "jobs").glob("*/record.json")}
    assert now.keys() == jobs.keys()
    assert [path for path in jobs if now[path] != jobs[path]] == [lost]
    assert all((out / "tables" / name).is_file() for name in ("quick.html", "claims.html"))
