"""Localizers on models of known place, in small: what `mechunlearn bench planted --quick` does."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from mechunlearn.cli import app


@pytest.mark.slow
def test_the_quick_bench_prints_every_localizer_and_goes_on_where_it_stopped(tmp_path):
    arguments = ["bench", "planted", "--quick", "--out", str(tmp_path / "bench")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    ladder = pd.read_csv(tmp_path / "bench/tables/ladder.csv", keep_default_na=False)
    assert len(ladder) == 6
    assert (ladder["reason"] == "").sum() >= 4, ladder["reason"].tolist()
    summary = pd.read_csv(tmp_path / "bench/tables/summary.csv")
    shown = {"attribution_patching", "relevance_patching", "resample_ablation", "retain_contrast"}
    assert set(summary["localizer"]) == shown | {"random", "depth prior"}
    assert set(summary["part"]) == {"development", "kept out"}
    assert (tmp_path / "bench/tables/planted.html").stat().st_size > 10_000
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "bench/ladder").rglob("*.safetensors")}
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert weights == {path: path.stat().st_mtime_ns for path in (tmp_path / "bench/ladder").rglob("*.safetensors")}
