"""What an attack brings back: one row a (fact, setting), before and after, and whether the attack can be believed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mechunlearn.facts import Fact
from mechunlearn.files import whole_file
from mechunlearn.html_card import html_card

# pandas has no complete types, so strict would complain on every line
# pyright: standard

Access = Literal["prompts", "activations", "weights", "original_weights"]
COLUMNS = ("subject", "relation", "answer", "part", "setting", "step", "p_true", "correct", "top")
FRAMES = ("rows", "before", "by_form")


@dataclass(frozen=True, kw_only=True)
class Health:
    """Signs that an attack worked as an attack and did not merely break the model; rates in [0, 1]."""

    fitted: float | None = None
    """Accuracy on the attack's own training facts; None when it trains on nothing."""
    retained_before: float | None = None
    retained_after: float | None = None
    perplexity_ratio: float | None = None
    least_fitted: float = 0.9
    most_retained_drop: float = 0.05
    most_perplexity_ratio: float = 1.2

    @property
    def reason(self) -> str:
        """What failed, in words; empty when nothing did."""
        failed = []
        if self.fitted is not None and not self.fitted >= self.least_fitted:
            failed.append(f"own training facts fitted {self.fitted:.0%} (needs {self.least_fitted:.0%})")
        drop = (self.retained_before or 0.0) - (self.retained_after or 0.0)
        if self.retained_after is not None and not drop <= self.most_retained_drop + 1e-9:
            failed.append(f"retained facts down {100 * drop:.0f} points (at most {100 * self.most_retained_drop:.0f})")
        if self.perplexity_ratio is not None and not self.perplexity_ratio <= self.most_perplexity_ratio:
            failed.append(f"perplexity x{self.perplexity_ratio:.2f} (at most x{self.most_perplexity_ratio})")
        return ", ".join(failed)

    @property
    def healthy(self) -> bool:
        """Whether every sign that was measured is within its limit."""
        return not self.reason


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack on one model: what it chose on the dev facts and what it then brought back of the hidden ones."""

    attack: str
    access: Access
    decides: bool
    """False for what only diagnoses (it runs or mixes in the original's weights)."""
    zero_budget: bool = False
    rows: pd.DataFrame
    """One row a (fact, setting, step) that was scored; columns as in `COLUMNS`."""
    before: pd.DataFrame
    """The same facts before the attack, canonical prompt."""
    chosen: str
    """The setting chosen on attack_dev; its rows are the attack's result."""
    chosen_step: int = 0
    health: Health
    options: Mapping[str, Any]
    seed: int
    model: str = ""
    facts_sha256: str = ""
    notes: Mapping[str, Any]
    """More numbers to show, as plain JSON data."""
    by_form: pd.DataFrame | None = None
    """Hidden facts in every form of asking after the attack, columns as in `rows` with the form as `setting`; for
    looking at single facts. None for attacks that do not ask."""
    fold: int = 0
    """Which part of the forgotten facts was hidden from it."""

    def final(self, part: str = "forget_hidden") -> pd.DataFrame:
        """The rows of the chosen setting and step."""
        rows = self.rows
        return rows.loc[(rows["part"] == part) & (rows["setting"] == self.chosen) & (rows["step"] == self.chosen_step)]

    def hidden_scores(self) -> dict[str, float]:
        """P(true | candidates) of every hidden fact after the attack, by fact."""
        return scores_by_fact(self.final())

    def hidden_before(self) -> dict[str, float]:
        """The same before the attack."""
        return scores_by_fact(self.before.loc[self.before["part"] == "forget_hidden"])

    def _repr_html_(self) -> str:
        before = self.before.loc[self.before["part"] == "forget_hidden"]
        parts: dict[str, Any] = {"before": before, "after": self.final()}  # Any: pandas has no complete types
        lines = {
            "on": self.model, "setting": f"{self.chosen}, step {self.chosen_step}" if self.chosen_step else self.chosen,
            "health": self.health.reason or "ok", "decides": "yes" if self.decides else "no, it only diagnoses",
            "seed": self.seed, "hidden facts": len(parts["after"]),
        }  # fmt: skip
        rows = [(name, part["p_true"].mean(), part["correct"].mean()) for name, part in parts.items()]
        return html_card(self.attack, lines, [("", "P(true answer)", "correct"), *rows])

    def save(self, path: Path) -> None:
        """Write `path`.json and the tables beside it, `path`.rows.parquet and so on."""
        frames = {name: getattr(self, name) for name in FRAMES}
        for name, frame in frames.items():
            if frame is None:
                continue
            with whole_file(path.with_name(f"{path.name}.{name}.parquet")) as partial:
                frame.to_parquet(partial, index=False)
        record = {key: value for key, value in self.__dict__.items() if key not in (*FRAMES, "health")}
        record["health"] = asdict(self.health)
        with whole_file(path.with_name(f"{path.name}.json")) as partial:
            partial.write_text(json.dumps(record, sort_keys=True, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "AttackResult":
        """Read back what `save` wrote."""
        record = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        paths = {name: path.with_name(f"{path.name}.{name}.parquet") for name in FRAMES}
        frames = {name: pd.read_parquet(file) for name, file in paths.items() if file.is_file()}
        fields: dict[str, Any] = {**record, **frames, "health": Health(**record["health"])}
        return cls(**fields)


def fact_id(subject: str, relation: str, answer: str) -> str:
    """A fact's identity in tables of scores."""
    return f"{subject}|{relation}|{answer}"


def scores_by_fact(rows: pd.DataFrame) -> dict[str, float]:
    """P(true) by fact; rows hold every fact once."""
    ids = [fact_id(*key) for key in zip(rows["subject"], rows["relation"], rows["answer"], strict=True)]
    if len(set(ids)) < len(ids):
        raise ValueError(f"attack rows: {len(ids) - len(set(ids))} facts stand twice; select one setting and step")
    return dict(zip(ids, (float(value) for value in rows["p_true"]), strict=True))


def fact_rows(facts: Sequence[Fact], scores: pd.DataFrame, *, part: str, setting: str, step: int = 0) -> pd.DataFrame:
    """Rows of a result from facts and their scores (columns p_true, correct and top, in the order of the facts)."""
    return pd.DataFrame(
        {
            "subject": [fact.subject for fact in facts],
            "relation": [fact.relation for fact in facts],
            "answer": [fact.target_true for fact in facts],
            "part": part,
            "setting": setting,
            "step": step,
            "p_true": scores["p_true"].to_numpy(dtype=float),
            "correct": scores["correct"].to_numpy(dtype=bool),
            "top": list(scores["top"]),
        },
        columns=list(COLUMNS),
    )
