"""Carrying out cells: each side once, in worker processes if there are any; finished cells are reused."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mechunlearn.cells import Attacked, CellTask, Side, attack_side, conclude, demonstrated, loaded, mean_p_true
from mechunlearn.controls.fabricated import fabricated_split
from mechunlearn.evidence import PositiveControl
from mechunlearn.facts import FactSplit
from mechunlearn.runs import Cell, CellRole, read_cell_record
from mechunlearn.settings import Settings


@dataclass(kw_only=True, eq=False)
class Judging:
    """The cells of a run: reused, under way in workers, or still to be judged here."""

    splits: Sequence[FactSplit]
    settings: Settings
    folder: Path
    pool: Executor | None = None
    fresh: bool = False
    tasks: list[CellTask] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=dict)
    sides: dict[str, Attacked | Future[Attacked]] = field(default_factory=dict)
    """By digest: the null of unedited models, for example, is needed by several cells and measured once."""
    _levels: dict[tuple[str, bool, bool], float] = field(default_factory=dict)

    def start(self, tasks: Sequence[CellTask]) -> None:
        """Take tasks on; finished cells of the same inputs are read, the others go to the workers if there are any."""
        for task in tasks:
            self.tasks.append(task)
            if not self.fresh and (cell := self._reuse(task)):
                self.cells[task.name] = cell
            elif self.pool is not None:
                for side in (*task.sides, *task.nulls):
                    if side.digest not in self.sides:
                        self.sides[side.digest] = self.pool.submit(attack_side, side, self.splits, self.settings)

    def finish(self, on_progress: Callable[[str, int], None]) -> tuple[Cell, ...]:
        """Judge every cell, the positive controls first; a cell is saved as soon as its verdict is known."""
        roles = get_args(CellRole)
        self.tasks.sort(key=lambda task: roles.index(task.role))
        controls: list[PositiveControl] = []
        for i, task in enumerate(task for task in self.tasks if task.role == "suppressed"):
            on_progress(f"judging: {task.name}", i)
            if task.name in self.cells:
                controls.append(PositiveControl.from_dict(self.cells[task.name].notes["control"]))
            else:
                sides, nulls = self._of(task.sides), self._of(task.nulls)
                controls.append(demonstrated(task, sides, nulls, self._bounds(task)))
        for i, task in enumerate(self.tasks):
            on_progress(f"judging: {task.name}", i)
            if task.name not in self.cells:
                sides, nulls = self._of(task.sides), self._of(task.nulls)
                cell = conclude(task, sides, nulls, self._bounds(task), controls)
                cell.save(self.folder / cell.name)
                self.cells[task.name] = cell
        return tuple(self.cells[task.name] for task in self.tasks)

    def _of(self, sides: Sequence[Side]) -> list[Attacked]:
        return [self._attacked(side) for side in sides]

    def _attacked(self, side: Side) -> Attacked:
        found = self.sides.get(side.digest)
        if isinstance(found, Future):
            found = found.result()
        elif found is None:
            found = attack_side(side, self.splits, self.settings)
        self.sides[side.digest] = found
        return found

    def _bounds(self, task: CellTask) -> dict[str, Any]:
        """What `decide` and `demonstrate_power` both take; the levels before any treatment are fixed here."""
        verdict, drop = self.settings.verdict, task.sides[0].drop_targets
        null_before = self._level(task.null or task.original, drop, made_up=task.null is None)
        return {
            "original": self._level(task.original, drop), "null_before": null_before,
            "null": "proxy" if task.null is None else "twin",
            "delta": verdict.delta, "draws": verdict.draws, "seed": self.settings.seed,
        }  # fmt: skip

    def _level(self, name: str, drop_targets: bool, *, made_up: bool = False) -> float:
        """Mean P(true) of an untreated model on the hidden facts, or on made-up ones."""
        key = name, drop_targets, made_up
        if key not in self._levels:
            model = loaded(name, device=self.settings.device, dtype=self.settings.dtype)
            splits = [fabricated_split(s, seed=self.settings.seed) for s in self.splits] if made_up else self.splits
            self._levels[key] = mean_p_true(model, splits, drop_targets)
        return self._levels[key]

    def _reuse(self, task: CellTask) -> Cell | None:
        """A finished cell of exactly these inputs, if there is one."""
        folder = self.folder / task.name
        return Cell.load(folder) if read_cell_record(folder).get("notes", {}).get("key") == task.key else None
