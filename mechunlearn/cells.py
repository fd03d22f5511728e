"""Judging one model state: edit it and its twin alike, evaluate, attack both alike, decide."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult
from mechunlearn.bench.suppressed import Acceptance, suppress_with_lora
from mechunlearn.components import Component
from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit, applied
from mechunlearn.evaluate import evaluate, take_baseline
from mechunlearn.facts import FactSplit
from mechunlearn.masks import ParameterMask, mask_of
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, component_parameters
from mechunlearn.runs import Cell, CellRole
from mechunlearn.settings import Settings
from mechunlearn.verdict import AttackEvidence, PositiveControl, decide, demonstrate_power, gather_evidence


@dataclass(frozen=True, kw_only=True, eq=False)
class CellTask:
    """What is to be judged, and against what."""

    name: str
    role: CellRole
    model: Model
    twin: Model | None
    original: Model | None = None
    """Who knew the facts to begin with, where that is not `model`."""
    mask: ParameterMask | None = None
    localizer: str | None = None
    editor: str | None = None
    share: float = 0.0
    key: str = ""
    """Hash of everything that decides the result."""

    def inputs(self) -> dict[str, Any]:
        """What tells this task from another of the same run, as JSON data."""
        return {
            "role": self.role, "model": self.model.name, "twin": self.twin and self.twin.name, "editor": self.editor,
            "components": [str(c) for c in self.mask.components] if self.mask else [],
        }  # fmt: skip


def judge(task: CellTask, split: FactSplit, *, settings: Settings, controls: Sequence[PositiveControl]) -> Cell:
    """Edit, evaluate and attack one cell and its twin, and decide.

    The null is the twin put through the same edit and the same attacks. Where wrong answers were trained in, they are
    dropped from the candidates on all sides.

    Args:
        controls: the positive controls so far; the suppressed cell demonstrates its own.
    """
    started = time.monotonic()
    edit, acceptance = _edit(task, task.model, split, settings)
    twin_edit, _ = _edit(task, task.twin, split, settings) if task.twin else (None, None)
    drop = edit is not None
    original = task.original or task.model
    baseline = take_baseline(original, split)
    with ExitStack() as stack:
        if edit is not None:
            stack.enter_context(applied(task.model, edit))
        evaluation = evaluate(task.model, split, original=baseline, drop_targets=drop, seed=settings.seed)
        edited = _attacks(task.model, split, settings, drop)
    null: tuple[AttackResult, ...] = ()
    if task.twin is not None:
        with ExitStack() as stack:
            if twin_edit is not None:
                stack.enter_context(applied(task.twin, twin_edit))
            null = _attacks(task.twin, split, settings, drop)
    evidence = _evidence(task, split, edited, null)
    before = _mean_p_true(original, split, drop)
    null_before = _mean_p_true(task.twin, split, drop) if task.twin else _chance(split)
    notes: dict[str, Any] = {"key": task.key, "A_o": before, "A_n": null_before}
    if task.role == "suppressed" and acceptance is not None:
        control = demonstrate_power(
            "lora", evidence, original=before, null_before=null_before, accepted=acceptance.accepted,
            delta=settings.verdict.delta, draws=settings.verdict.draws, seed=settings.seed,
            null="twin" if task.twin else "proxy",
        )  # fmt: skip
        controls = (control,)
        notes |= {"control": asdict(control), "acceptance": asdict(acceptance) | {"reason": acceptance.reason}}
    verdict = decide(
        evidence, original=before, null_before=null_before, controls=controls, delta=settings.verdict.delta,
        draws=settings.verdict.draws, seed=settings.seed, null="twin" if task.twin else "proxy",
    )  # fmt: skip
    return Cell(
        name=task.name, role=task.role, verdict=verdict, evaluation=evaluation, edited=edited, null=null,
        localizer=task.localizer, editor=task.editor,
        components=tuple(str(c) for c in task.mask.components) if task.mask else (),
        n_selected=edit.mask.n_selected if edit else 0, share=task.share,
        weight_changes=_weight_changes(task.model, edit) if edit else None,
        notes=notes | {"seconds": round(time.monotonic() - started, 1)},
    )  # fmt: skip


def _edit(
    task: CellTask, model: Model, split: FactSplit, settings: Settings
) -> tuple[WeightEdit | None, Acceptance | None]:
    """The cell's edit, made on this model; the same options on the original and on the twin."""
    if task.role == "suppressed":
        suppressed = suppress_with_lora(model, split, seed=settings.seed)
        return suppressed.edit, suppressed.acceptance
    if task.mask is None or task.editor is None:
        return None, None
    mask = task.mask if model is task.model else mask_of(model, task.mask.components)
    options = settings.options("edit", task.editor) | {"seed": settings.seed}
    return EDITORS.get(task.editor).function(model, mask, split, **options), None


def _attacks(model: Model, split: FactSplit, settings: Settings, drop_targets: bool) -> tuple[AttackResult, ...]:
    results = []
    for name in settings.attack:
        options = settings.options("attack", name) | {"seed": settings.seed, "drop_targets": drop_targets}
        results.append(ATTACKS.get(name).function(model, split, **options))
    return tuple(results)


def _evidence(
    task: CellTask, split: FactSplit, edited: Sequence[AttackResult], null: Sequence[AttackResult]
) -> list[AttackEvidence]:
    if task.twin is not None:
        return [gather_evidence([u], [n]) for u, n in zip(edited, null, strict=True)]
    chance = _chance(split)
    return [
        AttackEvidence(
            name=u.attack, facts=tuple(u.hidden_scores()), seeds=(u.seed,) * len(u.hidden_scores()),
            edited=tuple(u.hidden_scores().values()), null=(chance,) * len(u.hidden_scores()),
            zero_budget=u.zero_budget, decides=u.decides, healthy=u.health.healthy, health=u.health.reason,
        )
        for u in edited
    ]  # fmt: skip


def _mean_p_true(model: Model, split: FactSplit, drop_targets: bool) -> float:
    return float(score_facts(model, split.forget_hidden, drop_targets=drop_targets)["p_true"].mean())


def _chance(split: FactSplit) -> float:
    return sum(1 / max(len(fact.choices), 2) for fact in split.forget_hidden) / len(split.forget_hidden)


def _weight_changes(model: Model, edit: WeightEdit) -> pd.DataFrame:
    """||W' - W|| / ||W|| of every MLP and attention sublayer the edit touches."""
    parameters = dict(model.hf.named_parameters())
    changed: dict[str, tuple[float, float]] = {}
    for name, values in edit.values.items():
        before = parameters[name].detach().float().cpu()
        difference = values.float() - before[edit.mask.full(name)]
        changed[name] = (float(difference.square().sum()), float(before.square().sum()))
    rows = []
    for layer in range(model.n_layers):
        for kind in ("mlp", "attention"):
            component = Component(kind, layer)
            own: Mapping[str, torch.Tensor] = component_parameters(model, component)
            sums = [changed[name] for name in own if name in changed]
            if sums:
                ratio = (sum(a for a, _ in sums) / max(sum(b for _, b in sums), 1e-30)) ** 0.5
                rows.append({"component": str(component), "layer": layer, "kind": kind, "relative_change": ratio})
    return pd.DataFrame(rows)
