"""What a run leaves behind: cells, scores and the record, in memory and under `.runs/<name>/`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mechunlearn.attack.results import AttackResult
from mechunlearn.components import ComponentScores
from mechunlearn.evaluate.results import Evaluation
from mechunlearn.files import whole_folder
from mechunlearn.html_card import html_card
from mechunlearn.verdict import Verdict

CellRole = Literal["original", "suppressed", "twin", "arm"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One model state that was judged: attacked beside its null, evaluated, and given a verdict."""

    name: str
    role: CellRole
    """The unedited original, a suppressed positive control, the second twin, or an arm (an edit)."""
    verdict: Verdict
    evaluation: Evaluation
    edited: tuple[AttackResult, ...]
    """The attacks on the model in question; of each one result a seed and hidden part."""
    null: tuple[AttackResult, ...]
    """The same attacks on the equally treated twin, in the same order; without a twin those for made-up facts."""
    localizer: str | None = None
    editor: str | None = None
    components: tuple[str, ...] = ()
    """What was edited, in short names."""
    n_selected: int = 0
    share: float = 0.0
    """Edited share of all MLP and attention parameters."""
    weight_changes: pd.DataFrame | None = None
    """component, relative_change = ||W' - W|| / ||W||, flips_int8, flips_int4; None for cells without a weight edit."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """More to show, as JSON data: acceptance of a suppressed control, seconds, ..."""

    def save(self, folder: Path) -> None:
        """Write the cell into `folder`, which appears whole or not at all."""
        with whole_folder(folder) as partial:
            self.evaluation.save(partial / "evaluation")
            for kind, results in (("edited", self.edited), ("null", self.null)):
                for i, result in enumerate(results):
                    result.save(partial / f"{kind}-{i}-{result.attack}")
            if self.weight_changes is not None:
                self.weight_changes.to_parquet(partial / "weight_changes.parquet", index=False)
            plain = ("name", "role", "localizer", "editor", "components", "n_selected", "share", "notes")
            record = {key: getattr(self, key) for key in plain} | {
                "verdict": self.verdict.to_dict(),
                "edited": [result.attack for result in self.edited],
                "null": [result.attack for result in self.null],
            }
            (partial / "cell.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Cell":
        """Read back what `save` wrote."""
        record = read_cell_record(folder)
        changes = folder / "weight_changes.parquet"
        for kind in ("edited", "null"):
            record[kind] = tuple(
                AttackResult.load(folder / f"{kind}-{i}-{name}") for i, name in enumerate(record[kind])
            )
        return cls(
            **{**record, "components": tuple(record["components"]), "verdict": Verdict.from_dict(record["verdict"])},
            evaluation=Evaluation.load(folder / "evaluation"),
            weight_changes=pd.read_parquet(changes) if changes.is_file() else None,
        )


def read_cell_record(folder: Path) -> dict[str, Any]:
    """The plain part of a saved cell; empty if there is none."""
    record = folder / "cell.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A finished run."""

    manifest: Mapping[str, Any]
    """The record: settings, model and fact hashes, versions, device, sizes of the split, seconds."""
    scores: Mapping[str, ComponentScores]
    """By localizer name."""
    agreement: pd.DataFrame
    """One row a pair of localizers: a, b, pearson, spearman, top_k, top_k_recall."""
    cells: tuple[Cell, ...]

    def cell(self, name: str) -> Cell:
        """The cell of that name."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise ValueError(
            f"run '{self.manifest['name']}': no cell {name!r}; cells: {', '.join(c.name for c in self.cells)}"
        )

    def _repr_html_(self) -> str:
        made_of = {key: self.manifest.get(key) for key in ("model", "twin", "facts", "finished")}
        lines = {key: of.get("name") if isinstance(of, Mapping) else of for key, of in made_of.items()}
        rows = [(c.name, ", ".join(c.components), f"{c.share:.1%}" if c.share else "", c.verdict) for c in self.cells]
        head = ("cell", "edited", "of all MLPs and attention", "verdict")
        return html_card(str(self.manifest["name"]), {**lines, "localizers": ", ".join(self.scores)}, [head, *rows])


def load_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: the folder is no finished run.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} is not a finished run: no manifest.json; run `mechunlearn run` first")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Run(
        manifest=manifest,
        scores={name: ComponentScores.load(folder / "scores" / f"{name}.safetensors") for name in manifest["scores"]},
        agreement=pd.read_csv(folder / "agreement.csv"),
        cells=tuple(Cell.load(folder / "cells" / name) for name in manifest["cells"]),
    )
