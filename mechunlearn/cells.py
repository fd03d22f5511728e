"""Judging one model state: treat it and its null alike, evaluate, attack both alike; then decide."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import pandas as pd

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult
from mechunlearn.changes import checkpoint_changes, edit_changes
from mechunlearn.checkpoints import load_model
from mechunlearn.components import Component
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.acceptance import Acceptance, accept
from mechunlearn.controls.fabricated import fabricated_split
from mechunlearn.controls.taught import teach
from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import Edit, WeightEdit, applied
from mechunlearn.evaluate import Evaluation, evaluate, take_baseline
from mechunlearn.evidence import AttackEvidence, PositiveControl, evidence_by_attack
from mechunlearn.facts import FactSplit
from mechunlearn.features import GUARDS
from mechunlearn.features.selection import NothingFound
from mechunlearn.masks import mask_of, n_localizable
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.runs import Cell, CellRole
from mechunlearn.settings import Settings
from mechunlearn.verdict import decide, demonstrate_power

SUPPRESSION_RATES = (6e-3, 2e-3, 6e-4, 2e-4)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model, what is done to it first, and what it is then attacked for; by names, so that it can travel."""

    model: str
    seed: int = 0
    """Of treatment and attacks."""
    editor: str | None = None
    components: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the treatment: the editor's for this cell alone, or those of `teach`."""
    guard: str | None = None
    """What guards its activations, in place of an edit."""
    suppression: str | None = None
    """Kind of suppression that is put on the model, in place of an edit."""
    taught: bool = False
    """Whether the model is taught the facts, in place of an edit; see `controls.taught`."""
    is_checkpoint: bool = False
    """Whether another tool made the model of the original."""
    fabricated: bool = False
    """Attacked for made-up facts in place of the forgotten ones."""
    drop_targets: bool = False
    against: str | None = None
    """The original that it is also evaluated against, and whose weights its own are compared with; None: neither."""

    @property
    def digest(self) -> str:
        """Equal for sides that would give the same results."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class CellTask:
    """What is to be judged, and against what; one pair of sides a seed."""

    name: str
    role: CellRole
    sides: tuple[Side, ...]
    nulls: tuple[Side, ...]
    """The same done to the twin; without one, the same model attacked for made-up facts."""
    original: str
    """Who knew the facts to begin with."""
    null: str | None
    """Who never did; None where made-up facts stand in."""
    localizer: str | None = None
    key: str = ""
    """Hash of everything that decides the result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """Everything measured on one side."""

    results: tuple[AttackResult, ...]
    """Attack by attack, and within an attack hidden part by hidden part."""
    evaluation: Evaluation | None = None
    acceptance: Acceptance | None = None
    n_selected: int = 0
    share: float = 0.0
    """Edited share of all MLP and attention parameters."""
    weight_changes: pd.DataFrame | None = None
    seconds: float = 0.0
    made_seconds: float | None = None
    """For the treatment alone; None where there is none."""
    comes_off: bool = False
    """Whether it is a guard, which somebody who has the weights takes off."""


@cache
def loaded(name: str, *, device: str, dtype: Any) -> Model:
    """One model object a process and name, until the run ends: every use of it restores it bit for bit."""
    return load_model(name, device=device, dtype=dtype)


def warm_up(settings: Settings) -> None:
    """Load a run's models in a fresh worker process."""
    for name in dict.fromkeys((settings.model, settings.twin, settings.second_twin)):
        if name:
            loaded(name, device=settings.device, dtype=settings.dtype)


def attack_side(side: Side, splits: Sequence[FactSplit], settings: Settings) -> Attacked:
    """Treat the model, evaluate it if asked, and attack it for the hidden facts of every split.

    The treatment is made once, on the first split; all splits hold the same forgotten facts and differ in which of
    them are hidden from the attacker. Injected answers (`target_new`) are dropped from the candidates where the side
    says so.
    """
    started = time.monotonic()
    model = _load(side.model, settings)
    shown = [fabricated_split(split, seed=settings.seed) for split in splits] if side.fabricated else list(splits)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        original = _load(side.against, settings) if side.against else None
        baseline = take_baseline(original, splits[0]) if original else None
        made = time.monotonic()
        edit = _guarded(side, model, splits[0], settings) or _treated(side, model, splits[0], settings)
        if edit is not None:
            found |= {"made_seconds": round(time.monotonic() - made, 1), "comes_off": edit.comes_off}
            stack.enter_context(applied(model, edit))
        if baseline is not None:
            options = settings.evaluate | {"seed": settings.seed, "drop_targets": side.drop_targets}
            found["evaluation"] = evaluate(model, splits[0], original=baseline, **options)
        results = []
        for name in settings.attack:
            options = settings.options("attack", name) | {"seed": side.seed, "drop_targets": side.drop_targets}
            for split in shown:
                results.append(replace(ATTACKS.get(name).function(model, split, **options), fold=split.fold))
    if isinstance(edit, WeightEdit):
        found["n_selected"] = edit.mask.n_selected
        found["share"] = edit.mask.n_selected / n_localizable(model)
        found["weight_changes"] = edit_changes(model, edit)
        if original is not None and side.suppression is not None:
            found["acceptance"] = accept(model, splits[0], edit)
    elif original is not None and side.is_checkpoint:
        found["weight_changes"] = checkpoint_changes(original, model)
    return Attacked(results=tuple(results), seconds=round(time.monotonic() - started, 1), **found)


def _load(name: str, settings: Settings) -> Model:
    return loaded(name, device=settings.device, dtype=settings.dtype)


def _guarded(side: Side, model: Model, split: FactSplit, settings: Settings) -> Edit | None:
    """The side's guard; none where nothing is found to guard against, as may be in a twin."""
    if side.guard is None:
        return None
    options = settings.options("guard", side.guard) | dict(side.options) | {"seed": side.seed}
    try:
        return GUARDS.get(side.guard).function(model, split, **options)
    except NothingFound:
        return None


def _treated(side: Side, model: Model, split: FactSplit, settings: Settings) -> WeightEdit | None:
    """What is done to the model first, if anything: it is taught, suppressed or edited."""
    if side.taught:
        return teach(model, split, **{**side.options, "seed": side.seed})
    if side.suppression is not None:
        given = settings.suppress.get(side.suppression, {})
        kind = SUPPRESSIONS.get(side.suppression).function
        return kind(model, split, **_accepted_options(side, split, settings, given))
    if side.editor is None:
        return None
    mask = mask_of(model, [Component.parse(name) for name in side.components])
    options = settings.options("edit", side.editor) | dict(side.options) | {"seed": side.seed}
    return EDITORS.get(side.editor).function(model, mask, split, **options)


def _accepted_options(side: Side, split: FactSplit, settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options given; without a learning rate among them, the first one at which the original is accepted.

    A rate that suits one size of model breaks another, so a control that is to work on any model has to look for its
    own; twins and made-up facts get the rate that was found on the original.
    """
    options = {**given, "seed": side.seed}
    if "learning_rate" in given:
        return options
    original, kind = _load(settings.model, settings), SUPPRESSIONS.get(side.suppression or "").function
    for rate in SUPPRESSION_RATES:
        edit = kind(original, split, **options, learning_rate=rate)
        if accept(original, split, edit).accepted:
            return options | {"learning_rate": rate}
    return options | {"learning_rate": SUPPRESSION_RATES[0]}


def demonstrated(
    task: CellTask, sides: Sequence[Attacked], nulls: Sequence[Attacked], bounds: Mapping[str, Any]
) -> PositiveControl:
    """Which attacks got the suppressed model's knowledge back; it must have been accepted under every seed."""
    accepted = all(side.acceptance is not None and side.acceptance.accepted for side in sides)
    evidence = evidence_of(sides, nulls, paired=task.null is not None)
    return demonstrate_power(task.sides[0].suppression or "unknown", evidence, accepted=accepted, **bounds)


def conclude(
    task: CellTask, sides: Sequence[Attacked], nulls: Sequence[Attacked], bounds: Mapping[str, Any],
    controls: Sequence[PositiveControl],
) -> Cell:  # fmt: skip
    """The cell with its verdict; what was evaluated and edited is that of the first seed."""
    first, own = sides[0], task.sides[0]
    notes: dict[str, Any] = {
        "key": task.key, "A_o": bounds["original"], "A_n": bounds["null_before"],
        "seconds": round(sum(side.seconds for side in (*sides, *nulls)), 1),
    }  # fmt: skip
    if first.made_seconds is not None and task.role == "arm":
        notes |= {"made_seconds": first.made_seconds, "comes_off": first.comes_off}
    if task.role == "suppressed" and first.acceptance is not None:
        notes["acceptance"] = first.acceptance.record
        notes["control"] = next(asdict(control) for control in controls if control.kind == own.suppression)
    if first.evaluation is None:
        raise ValueError(f"cell '{task.name}': its first side was not evaluated")
    evidence = evidence_of(sides, nulls, paired=task.null is not None)
    verdict = decide(evidence, controls=controls, alike=not own.is_checkpoint, **bounds)
    return Cell(
        name=task.name, role=task.role, evaluation=first.evaluation, verdict=verdict,
        edited=tuple(result for side in sides for result in side.results),
        null=tuple(result for side in nulls for result in side.results),
        localizer=task.localizer, editor=own.editor or own.guard, components=own.components or _changed(own, first),
        n_selected=first.n_selected,
        share=first.share, weight_changes=first.weight_changes, notes=notes,
    )  # fmt: skip


def _changed(side: Side, found: Attacked) -> tuple[str, ...]:
    """The components that another tool changed."""
    changes = found.weight_changes
    return tuple(changes["component"]) if side.is_checkpoint and changes is not None else ()


def evidence_of(sides: Sequence[Attacked], nulls: Sequence[Attacked], *, paired: bool) -> list[AttackEvidence]:
    """Attack by attack, the scores of all seeds and hidden parts on the model and on its null.

    Args:
        paired: False where the null was attacked for other, made-up facts.
    """
    edited, null = ([result for side in group for result in side.results] for group in (sides, nulls))
    return evidence_by_attack(edited, null, paired=paired)


def mean_p_true(model: Model, splits: Sequence[FactSplit], drop_targets: bool) -> float:
    """Mean P(true | candidates) over the hidden facts of all splits, asked by their prompt."""
    hidden = [fact for split in splits for fact in split.forget_hidden]
    return float(score_facts(model, hidden, drop_targets=drop_targets)["p_true"].to_numpy().mean())
