"""An evaluation: one row a (fact, form, metric); every mean and interval is derived from the rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.statistics import mean_interval

COLUMNS = ("part", "subject", "relation", "answer", "form", "metric", "value")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model knows and how much it was disturbed; rates in [0, 1], KL in nats a token."""

    rows: pd.DataFrame
    """Columns as in `COLUMNS`; numbers about texts rather than facts have empty subject, relation and answer."""
    options: Mapping[str, Any]
    model: str = ""
    facts_sha256: str = ""

    def table(self) -> pd.DataFrame:
        """Mean, 95% interval (bootstrap over facts) and n of every part, form and metric.

        The forms of one kind ("paraphrase:0", "paraphrase:1") are averaged within each fact first.
        """
        rows: Any = self.rows.assign(form=self.rows["form"].str.partition(":")[0])
        keys = ["part", "subject", "relation", "answer", "form", "metric"]
        by_fact = rows.groupby(keys, sort=False)["value"].mean().reset_index()
        lines = []
        for key, group in by_fact.groupby(["part", "form", "metric"], sort=False):
            interval = mean_interval(group["value"].to_numpy())
            lines.append((*key, interval.value, interval.lower, interval.upper, interval.n))
        columns = ["part", "form", "metric", "mean", "lower", "upper", "n"]
        return pd.DataFrame(lines, columns=pd.Index(columns))

    def mean(self, part: str, metric: str, form: str = "prompt") -> float:
        """One number of the table.

        Raises:
            ValueError: nothing was measured under that part, metric and form.
        """
        rows: Any = self.rows  # pandas has no complete types
        values = rows[
            (rows["part"] == part) & (rows["metric"] == metric) & (rows["form"].str.partition(":")[0] == form)
        ]
        if values.empty:
            known = sorted(set(zip(rows["part"], rows["form"].str.partition(":")[0], rows["metric"], strict=True)))
            raise ValueError(f"evaluation: nothing for {(part, form, metric)}; measured: {known}")
        return float(values.groupby(["subject", "relation", "answer"])["value"].mean().mean())

    def save(self, path: Path) -> None:
        """Write `path`.parquet (rows) and `path`.json (the rest)."""
        self.rows.to_parquet(path.with_name(f"{path.name}.parquet"), index=False)
        record = {"options": dict(self.options), "model": self.model, "facts_sha256": self.facts_sha256}
        path.with_name(f"{path.name}.json").write_text(json.dumps(record, sort_keys=True, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read back what `save` wrote."""
        record = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        return cls(rows=pd.read_parquet(path.with_name(f"{path.name}.parquet")), **record)
