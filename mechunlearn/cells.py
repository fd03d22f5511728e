"""Judging one model state: edit it and its twin alike, evaluate, attack both alike; then decide."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import pandas as pd
from torch import Tensor

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult
from mechunlearn.bench.suppressed import Acceptance, suppress_with_lora
from mechunlearn.checkpoints import load_model
from mechunlearn.components import Component
from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import WeightEdit, applied
from mechunlearn.evaluate import Evaluation, evaluate, take_baseline
from mechunlearn.evidence import AttackEvidence, PositiveControl, gather_evidence
from mechunlearn.facts import FactSplit
from mechunlearn.masks import mask_of, n_localizable
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model, component_parameters
from mechunlearn.prompts import candidates
from mechunlearn.runs import Cell, CellRole
from mechunlearn.settings import Settings
from mechunlearn.verdict import decide, demonstrate_power


@dataclass(frozen=True, kw_only=True)
class CellTask:
    """What is to be judged, and against what; models by name, so that a task can go to another process."""

    name: str
    role: CellRole
    model: str
    twin: str | None
    original: str
    """Who knew the facts to begin with: `model` itself, except for a second twin."""
    components: tuple[str, ...] = ()
    localizer: str | None = None
    editor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Editor options of this cell alone."""
    seed: int = 0
    """Of its editor."""
    key: str = ""
    """Hash of everything that decides the result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Everything measured on one cell; what is missing is the verdict, which needs the other cells' controls."""

    task: CellTask
    evaluation: Evaluation
    edited: tuple[AttackResult, ...]
    null: tuple[AttackResult, ...]
    """Empty for a second twin, which shares the original's."""
    original: float
    """Mean P(true | candidates) on the hidden facts before attacks, of the original (A_o) ..."""
    null_before: float
    """... and of the twin (A_n), or of guessing without one."""
    guessing: tuple[float, ...]
    """Hidden fact by hidden fact, what guessing the relation's commonest answer gets."""
    acceptance: Acceptance | None = None
    n_selected: int = 0
    share: float = 0.0
    """Edited share of all MLP and attention parameters."""
    weight_changes: pd.DataFrame | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@cache
def loaded(name: str, *, device: str, dtype: Any) -> Model:
    """One model object a process and name, until the run ends: every use of it restores it bit for bit."""
    return load_model(name, device=device, dtype=dtype)


def warm_up(settings: Settings) -> None:
    """Load a run's models in a fresh worker process."""
    for name in dict.fromkeys((settings.model, settings.twin, settings.second_twin)):
        if name:
            loaded(name, device=settings.device, dtype=settings.dtype)


def judge(task: CellTask, split: FactSplit, settings: Settings) -> Judged:
    """Edit, evaluate and attack one cell and its twin.

    The null is the twin put through the same edit and the same attacks. For an arm, the wrong answers (`target_new`)
    are dropped from the candidates on all sides, whichever its editor; controls are judged among all candidates.
    """
    started = time.monotonic()
    load = partial(loaded, device=settings.device, dtype=settings.dtype)
    model, original = load(task.model), load(task.original)
    twin = load(task.twin) if task.twin else None
    edit, acceptance = _edit(task, model, split, settings)
    drop = task.role == "arm"  # the suppressed model must be at chance among all candidates
    baseline = take_baseline(original, split)
    before = _mean_p_true(original, split, drop)
    guessing = _guessing(split, drop)
    null_before = _mean_p_true(twin, split, drop) if twin else sum(guessing) / len(guessing)
    with ExitStack() as stack:
        if edit is not None:
            stack.enter_context(applied(model, edit))
        options = settings.evaluate | {"seed": settings.seed, "drop_targets": drop}
        evaluation = evaluate(model, split, original=baseline, **options)
        edited = _attacks(model, split, settings, drop)
    null: tuple[AttackResult, ...] = ()
    # a second twin is judged against the unedited first, as the original is
    if twin is not None and task.role != "twin":
        twin_edit, _ = _edit(task, twin, split, settings)
        with ExitStack() as stack:
            if twin_edit is not None:
                stack.enter_context(applied(twin, twin_edit))
            null = _attacks(twin, split, settings, drop)
    return Judged(
        task=task, evaluation=evaluation, edited=edited, null=null, original=before, null_before=null_before,
        guessing=guessing, acceptance=acceptance, n_selected=edit.mask.n_selected if edit else 0,
        share=edit.mask.n_selected / n_localizable(model) if edit else 0.0,
        weight_changes=_weight_changes(model, edit) if edit else None,
        notes={"seconds": round(time.monotonic() - started, 1)},
    )  # fmt: skip


def demonstrated(judged: Judged, settings: Settings) -> PositiveControl:
    """Which attacks got the suppressed model's knowledge back."""
    accepted = judged.acceptance is not None and judged.acceptance.accepted
    return demonstrate_power("lora", _evidence(judged), accepted=accepted, **_bounds(judged, settings))


def conclude(judged: Judged, settings: Settings, controls: Sequence[PositiveControl]) -> Cell:
    """The cell with its verdict."""
    task = judged.task
    notes = {"key": task.key, "A_o": judged.original, "A_n": judged.null_before, **judged.notes}
    if judged.acceptance is not None:
        notes["acceptance"] = asdict(judged.acceptance) | {"reason": judged.acceptance.reason}
        notes["controls"] = [asdict(control) for control in controls]
    return Cell(
        name=task.name, role=task.role, evaluation=judged.evaluation, edited=judged.edited, null=judged.null,
        verdict=decide(_evidence(judged), controls=controls, **_bounds(judged, settings)),
        localizer=task.localizer, editor=task.editor, components=task.components, n_selected=judged.n_selected,
        share=judged.share, weight_changes=judged.weight_changes, notes=notes,
    )  # fmt: skip


def _bounds(judged: Judged, settings: Settings) -> dict[str, Any]:
    """What `decide` and `demonstrate_power` both take."""
    return {
        "original": judged.original, "null_before": judged.null_before, "null": "twin" if judged.null else "proxy",
        "delta": settings.verdict.delta, "draws": settings.verdict.draws, "seed": settings.seed,
    }  # fmt: skip


def _edit(
    task: CellTask, model: Model, split: FactSplit, settings: Settings
) -> tuple[WeightEdit | None, Acceptance | None]:
    """The cell's edit, made on this model; the same options on the original and on the twin."""
    if task.role == "suppressed":
        own: dict[str, Any] = {**settings.suppress, "seed": task.seed}
        made = suppress_with_lora(model, split, **own)
        return made.edit, made.acceptance
    if task.editor is None:
        return None, None
    mask = mask_of(model, [Component.parse(name) for name in task.components])
    options = settings.options("edit", task.editor) | dict(task.options) | {"seed": task.seed}
    return EDITORS.get(task.editor).function(model, mask, split, **options), None


def _attacks(model: Model, split: FactSplit, settings: Settings, drop_targets: bool) -> tuple[AttackResult, ...]:
    results = []
    for name in settings.attack:
        options = settings.options("attack", name) | {"seed": settings.seed, "drop_targets": drop_targets}
        results.append(ATTACKS.get(name).function(model, split, **options))
    return tuple(results)


def _evidence(judged: Judged) -> list[AttackEvidence]:
    if judged.null:
        return [gather_evidence([u], [n]) for u, n in zip(judged.edited, judged.null, strict=True)]
    evidence = []
    for u in judged.edited:
        scores = u.hidden_scores()
        evidence.append(
            AttackEvidence(
                name=u.attack, facts=tuple(scores), seeds=(u.seed,) * len(scores), edited=tuple(scores.values()),
                null=judged.guessing, zero_budget=u.zero_budget, decides=u.decides,
                healthy=u.health.healthy, health=u.health.reason,
            )
        )  # fmt: skip
    return evidence


def _mean_p_true(model: Model, split: FactSplit, drop_targets: bool) -> float:
    return float(score_facts(model, split.forget_hidden, drop_targets=drop_targets)["p_true"].to_numpy().mean())


def _guessing(split: FactSplit, drop_targets: bool) -> tuple[float, ...]:
    """For every hidden fact the share of its relation's hidden facts with the commonest answer known, or chance.

    What a model that knows nothing but how common answers are can get, and any attack that trains teaches that; the
    larger of the two. The commonest answer is counted on the other facts alone: hidden ones do not set their own null.
    """
    known: dict[str, Counter[str]] = {}
    for fact in (*split.forget_shown, *split.attack_dev, *split.retain_train):
        known.setdefault(fact.relation, Counter())[fact.target_true] += 1
    hidden = Counter(fact.relation for fact in split.forget_hidden)
    right = Counter(
        fact.relation
        for fact in split.forget_hidden
        if fact.relation in known and fact.target_true == known[fact.relation].most_common(1)[0][0]
    )
    return tuple(
        max(right[fact.relation] / hidden[fact.relation], 1 / len(candidates(fact, drop_targets=drop_targets)))
        for fact in split.forget_hidden
    )


def _weight_changes(model: Model, edit: WeightEdit) -> pd.DataFrame:
    """||W' - W|| / ||W|| of every MLP and attention sublayer the edit touches."""
    parameters = dict(model.hf.named_parameters())
    squares: dict[str, tuple[float, float]] = {}
    for name, values in edit.values.items():
        before = parameters[name].detach().float().cpu()
        difference = values.float() - before[edit.mask.full(name)]
        squares[name] = (float(difference.square().sum()), float(before.square().sum()))
    rows = []
    for layer in range(model.n_layers):
        for kind in ("mlp", "attention"):
            own: Mapping[str, Tensor] = component_parameters(model, Component(kind, layer))
            touched = [squares[name] for name in own if name in squares]
            if touched:
                change, norm = (sum(column) for column in zip(*touched, strict=True))
                rows.append((str(Component(kind, layer)), layer, kind, (change / max(norm, 1e-30)) ** 0.5))
    return pd.DataFrame(rows, columns=pd.Index(["component", "layer", "kind", "relative_change"]))
