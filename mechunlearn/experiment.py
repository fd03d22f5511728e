"""A run: settings -> facts and models -> scores -> masks -> cells -> the folder `.runs/<name>/`."""

import hashlib
import inspect
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.cells import CellTask, judge
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact, FactSet, FactSplit, balanced_sample, split_facts, with_edit_targets
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.agreement import agreement
from mechunlearn.masks import ParameterMask, mask_of, n_localizable, random_mask_like, select_components
from mechunlearn.metrics import known_facts
from mechunlearn.models import Model, load_model
from mechunlearn.organisms.forget_sets import load_forget_set
from mechunlearn.runs import Cell, Run, load_run, whole_folder
from mechunlearn.settings import ArmSettings, FactsSettings, Settings
from mechunlearn.sources.loading import load_facts
from mechunlearn.statistics import facts_needed
from mechunlearn.verdict import PositiveControl

Progress = Callable[[str, float, float], None]
EXACT = "resample_ablation"
MATCHED_CONTROLS = ("random_mlps", "random_components")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """What every later stage works on: the models, and the split of the facts that the original knows."""

    settings: Settings
    model: Model
    twin: Model | None
    second_twin: Model | None
    facts: FactSet
    split: FactSplit
    n_unknown: int
    """Facts chosen to be forgotten that the original did not know to begin with."""


def choose_facts(settings: FactsSettings) -> tuple[FactSet, tuple[Fact, ...]]:
    """All facts, and those that are candidates for forgetting.

    Raises:
        ValueError: neither a forget set nor a relation nor n, or more facts than there are.
    """
    if settings.forget:
        return load_forget_set(settings.forget)
    facts = load_facts(settings.source, format=settings.format)
    pool = facts.of(settings.relation) if settings.relation else facts
    return facts, balanced_sample(pool, settings.n) if settings.n else pool.facts


def prepare(settings: Settings) -> Stage:
    """Load models and facts, keep what the original knows, and deal the split."""
    facts, forget = choose_facts(settings.facts)
    load = {"device": settings.device, "dtype": settings.dtype}
    model = load_model(settings.model, **load)
    twin = load_model(settings.twin, **load) if settings.twin else None
    second = load_model(settings.second_twin, **load) if settings.second_twin else None
    known = {fact.key for fact in known_facts(model, facts, threshold=settings.facts.known)}
    if not (kept := [fact for fact in forget if fact.key in known]):
        raise ValueError(f"{settings.model} knows none of the {len(forget)} facts to forget; choose facts that it knows")
    targeted = with_edit_targets(kept, seed=settings.seed)
    split = split_facts(
        facts.where(lambda fact: fact.key in known), targeted,
        folds=settings.facts.folds, fold=settings.facts.fold, seed=settings.seed,
    )  # fmt: skip
    return Stage(
        settings=settings, model=model, twin=twin, second_twin=second, facts=facts, split=split,
        n_unknown=len(forget) - len(kept),
    )  # fmt: skip


def localize(stage: Stage, name: str, *, seed: int | None = None) -> ComponentScores:
    """Run one localizer with the run's options on the facts to forget; it gets the twin if it takes one."""
    method = LOCALIZERS.get(name)
    options = stage.settings.options("localize", name)
    takes = inspect.signature(method.function).parameters
    if "seed" in takes:
        options["seed"] = stage.settings.seed + (seed or 0) if seed is not None or not options.get("seed") else options["seed"]
    if "twin" in takes:
        options["twin"] = stage.twin
    return method.function(stage.model, stage.split.forget, **options)


def choose_masks(stage: Stage, scores: Mapping[str, ComponentScores]) -> dict[str, ParameterMask]:
    """The mask of every arm.

    Random arms take as many components of each kind as the first arm that is not a control, so that they edit
    exactly the same number of parameters.
    """
    masks: dict[str, ParameterMask] = {}
    arms = stage.settings.arms
    for arm in [arm for arm in arms if arm.localizer not in MATCHED_CONTROLS]:
        masks[arm.name] = _selected(stage, arm, scores[arm.localizer])
    leading = next(iter(masks.values()), None)
    for i, arm in enumerate(arm for arm in arms if arm.localizer in MATCHED_CONTROLS):
        seed = stage.settings.seed + (arm.seed if arm.seed is not None else i)
        if leading is None or arm.budget or arm.kinds:
            masks[arm.name] = _selected(stage, arm, localize(stage, arm.localizer, seed=seed))
        else:
            masks[arm.name] = random_mask_like(leading, stage.model, seed=seed)
    return {arm.name: masks[arm.name] for arm in arms}


def _selected(stage: Stage, arm: ArmSettings, scores: ComponentScores) -> ParameterMask:
    if arm.localizer in ("all_mlps", "nonlocalized"):
        return mask_of(stage.model, scores.components)
    settings = stage.settings.mask
    return select_components(scores, stage.model, budget=arm.budget or settings.budget, kinds=arm.kinds or settings.kinds)


def run_experiment(
    settings: Settings, folder: Path, *, fresh: bool = False, on_progress: Progress = lambda text, done, total: None
) -> Run:
    """Run everything the settings ask for and write it to `folder`; finished cells of the same inputs are reused.

    Raises:
        ValueError: settings that cannot be carried out; nothing is left behind.
    """
    started = time.monotonic()
    stage = prepare(settings)
    wanted = list(dict.fromkeys([*settings.localize, *(arm.localizer for arm in settings.arms), EXACT]))
    wanted = [name for name in wanted if name not in MATCHED_CONTROLS]
    total = 2 * len(wanted) + 10 * (len(settings.arms) + 3)
    scores: dict[str, ComponentScores] = {}
    for i, name in enumerate(wanted):
        on_progress(f"localizing: {name}", 2 * i, total)
        scores[name] = localize(stage, name)
    masks = choose_masks(stage, scores)
    tasks = _tasks(stage, masks)
    cells: list[Cell] = []
    controls: tuple[PositiveControl, ...] = ()
    for i, task in enumerate(tasks):
        on_progress(f"judging: {task.name}", 2 * len(wanted) + 10 * i, total)
        cell = _reuse(folder / "cells" / task.name, task.key) if not fresh else None
        if cell is None:
            cell = judge(task, stage.split, settings=settings, controls=controls)
            cell.save(folder / "cells" / task.name)
        if task.role == "suppressed":
            controls = (_control(cell),)
        cells.append(cell)
    agreements = _agreements(scores)
    manifest = _manifest(stage, scores, tasks, time.monotonic() - started) | {"summary": _summary(scores, agreements)}
    _write(folder, manifest, scores, agreements)
    return replace(load_run(folder), cells=tuple(cells))


def _tasks(stage: Stage, masks: Mapping[str, ParameterMask]) -> list[CellTask]:
    """The suppressed control first, for the other verdicts need the power it demonstrates."""
    settings, model, twin = stage.settings, stage.model, stage.twin
    tasks: list[CellTask] = []
    if settings.suppressed_control:
        tasks.append(CellTask(name="suppressed", role="suppressed", model=model, twin=twin))
    tasks.append(CellTask(name="original", role="original", model=model, twin=twin))
    if stage.second_twin is not None and twin is not None:
        tasks.append(CellTask(name="second-twin", role="twin", model=stage.second_twin, twin=twin, original=model))
    tasks += [
        CellTask(
            name=arm.name, role="arm", model=model, twin=twin, mask=masks[arm.name], localizer=arm.localizer,
            editor=arm.editor, share=masks[arm.name].n_selected / n_localizable(model),
        )
        for arm in settings.arms
    ]  # fmt: skip
    base = _digest([settings.model_dump(exclude={"arms", "name", "workers", "localize"}), stage.split.sha256, model.sha256])
    for arm in settings.arms:
        settings.options("edit", arm.editor)
    return [replace(task, key=_digest([base, task.name, task.inputs(), version("mechunlearn")])) for task in tasks]


def _control(cell: Cell) -> PositiveControl:
    return PositiveControl(**{**cell.notes["control"], "recovered_by": tuple(cell.notes["control"]["recovered_by"])})


def _reuse(folder: Path, key: str) -> Cell | None:
    """A finished cell of exactly these inputs, if there is one."""
    if not (folder / "cell.json").is_file():
        return None
    cell = Cell.load(folder)
    return cell if cell.notes.get("key") == key else None


def _agreements(scores: Mapping[str, ComponentScores]) -> pd.DataFrame:
    """Every localizer against the exact effect of each MLP at the subject."""
    exact = scores[EXACT].at("subject")
    rows = [
        {"a": name, "b": f"{EXACT} at the subject"} | agreement(given, exact)
        for name, given in scores.items()
        if name != EXACT and len(set(given.values)) > 1
    ]
    return pd.DataFrame(rows, columns=["a", "b", "pearson", "spearman", "top_k_recall", "k", "n_components"])


def _summary(scores: Mapping[str, ComponentScores], agreements: pd.DataFrame) -> list[str]:
    """Where the localizers point and how that agrees with the exact effect, in one line each."""
    exact = scores[EXACT].at("subject")
    lines = [f"{EXACT} (exact, each MLP at the subject): highest {_highest(exact)}"]
    for row in agreements.itertuples():
        given = scores[str(row.a)]
        band = given.notes.get("band")
        where = f"; band m{band['first']} to m{band['last']}" if isinstance(band, Mapping) else ""
        where = f"; band none ({given.notes['band_reason']})" if band == "none" else where
        lines.append(
            f"{row.a}: highest {_highest(given)}{where}; against the exact effect: Spearman {row.spearman:.2f}, "
            f"{round(row.top_k_recall * row.k)} of the top {row.k} the same"
        )
    return lines


def _highest(scores: ComponentScores, n: int = 3) -> str:
    values = dict(zip(scores.components, scores.values, strict=True))
    return ", ".join(f"{component} ({values[component]:+.2f})" for component in scores.ranking()[:n])


def _manifest(stage: Stage, scores: Mapping[str, ComponentScores], tasks: Sequence[CellTask], seconds: float) -> dict[str, Any]:
    split, model = stage.split, stage.model
    packages = ("mechunlearn", "torch", "transformers", "numpy", "scikit-learn", "pandas")
    return {
        "name": stage.settings.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "settings": stage.settings.model_dump(),
        "model": {
            "name": model.name, "revision": model.revision, "sha256": model.sha256, "architecture": model.architecture.name,
            "n_layers": model.n_layers, "d_model": model.d_model, "n_heads": model.n_heads,
        },
        "twin": stage.twin and {"name": stage.twin.name, "sha256": stage.twin.sha256},
        "facts": {
            "name": stage.facts.name, "sha256": stage.facts.sha256, "split_sha256": split.sha256, "unknown": stage.n_unknown,
            "parts": {
                part: len(getattr(split, part))
                for part in ("forget_shown", "attack_dev", "forget_hidden", "retain_train", "retain_test", "same_subject")
            },
        },
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "scores": list(scores),
        "cells": [task.name for task in tasks],
    }  # fmt: skip


def _write(folder: Path, manifest: Mapping[str, Any], scores: Mapping[str, ComponentScores], agreements: pd.DataFrame) -> None:
    """Scores first, the manifest last: a folder with a manifest is a finished run."""
    with whole_folder(folder / "scores") as partial:
        for name, given in scores.items():
            given.save(partial / f"{name}.safetensors")
    agreements.to_csv(folder / "agreement.csv", index=False)
    partial = folder / "manifest.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "manifest.json")


def plan_experiment(settings: Settings) -> dict[str, pd.DataFrame]:
    """What a run would do: its cells, the parts of its facts, and whether they can carry a verdict."""
    facts, forget = choose_facts(settings.facts)
    model = load_model(settings.model, device="meta" if settings.device == "meta" else "cpu", dtype=settings.dtype)
    n_hidden = len(forget) // settings.facts.folds
    budget = settings.mask.budget
    entries = n_localizable(model)
    mlp = mask_of(model, [Component("mlp", 0)]).n_selected
    arms = [
        {
            "cell": arm.name, "editor": arm.editor, "localizer": arm.localizer,
            "may edit": f"{arm.budget or budget}" + (f" (an MLP is {mlp / entries:.3f})" if arm.localizer != "nonlocalized" else ""),
        }
        for arm in settings.arms
    ]  # fmt: skip
    spreads = (0.1, 0.2, 0.4)
    power = [
        {"sd of a fact's D": sd, "share left": 0.0, "hidden facts needed": facts_needed(sd=sd, margin=settings.verdict.delta),
         "hidden facts there": n_hidden}
        for sd in spreads
    ]  # fmt: skip
    chosen = [{"facts": facts.name, "all": len(facts), "to forget": len(forget), "hidden in one fold": n_hidden}]
    return {"facts": pd.DataFrame(chosen), "arms": pd.DataFrame(arms), "power": pd.DataFrame(power)}


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
