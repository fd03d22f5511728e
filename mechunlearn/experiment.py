"""A run: settings -> facts and models -> scores -> masks -> cells -> the folder `.runs/<name>/`."""

import hashlib
import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechunlearn.cells import CellTask, Side, loaded, warm_up
from mechunlearn.checkpoints import choose_device, load_model
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact, FactSet, FactSplit, balanced_sample, rotations, split_facts, with_edit_targets
from mechunlearn.files import whole_file, whole_folder
from mechunlearn.judging import Judging
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.agreement import agreement
from mechunlearn.localize.checks import FIRST_ORDER, describe_checks, with_agreement, with_stability
from mechunlearn.masks import ParameterMask, mask_of, n_localizable, select_components
from mechunlearn.metrics import known_facts
from mechunlearn.models import Model
from mechunlearn.organisms.forget_sets import load_forget_set
from mechunlearn.power import power_table
from mechunlearn.prompts import candidates
from mechunlearn.random_masks import random_mask_like
from mechunlearn.runs import Cell, CellRole, Run
from mechunlearn.settings import ArmSettings, FactsSettings, Settings
from mechunlearn.sources.loading import load_facts

Progress = Callable[[str, float, float], None]
EXACT = "resample_ablation"
MATCHED_CONTROLS = ("random_mlps", "random_components")
WHOLE_CONTROLS = ("all_mlps", "nonlocalized")
PARTS = ("forget_shown", "attack_dev", "forget_hidden", "retain_train", "retain_test", "same_subject")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """What every later stage works on: the models, and the split of the facts that the original knows."""

    settings: Settings
    model: Model
    twin: Model | None
    second_twin: Model | None
    facts: FactSet
    splits: tuple[FactSplit, ...]
    """The split that edits are made on; and, if parts are rotated, those that hide its other parts."""
    n_unknown: int
    """Facts that could have been forgotten but that the original did not know to begin with."""

    @property
    def split(self) -> FactSplit:
        """The split that edits are made on."""
        return self.splits[0]


def choose_facts(settings: FactsSettings, *, seed: int = 0) -> tuple[FactSet, tuple[Fact, ...]]:
    """All facts, and those to forget, before any model is asked which of them it knows.

    Raises:
        ValueError: an unknown forget set, relation or answer, facts to forget that are not in the source, or more of
            them than there are.
    """
    facts, pool = _forgettable(settings)
    return _drawn(settings, facts, pool, pool, seed)


def _forgettable(settings: FactsSettings) -> tuple[FactSet, tuple[Fact, ...]]:
    """All facts, and those from which `_drawn` takes the ones to forget."""
    if settings.forget or settings.forgotten:
        return load_forget_set(settings.forget) if settings.forget else _named(settings)
    facts = load_facts(settings.source, format=settings.format)
    pool = facts.of(settings.relation) if settings.relation else facts
    if settings.answer is not None:
        answers = Counter(fact.target_true for fact in pool)
        if settings.answer not in answers:
            known = ", ".join(answer for answer, _ in answers.most_common(12)) + (", ..." if len(answers) > 12 else "")
            raise ValueError(f"facts.answer: got {settings.answer!r}, allowed for {settings.source}: {known}")
        pool = pool.where(lambda fact: fact.target_true == settings.answer)
    if (subjects := len({fact.subject for fact in pool})) < 4:
        raise ValueError(
            f"{settings.source}: got facts of {subjects} subjects, allowed: 4 or more, to forget and to keep"
        )
    return facts, pool.facts


def _drawn(
    settings: FactsSettings, facts: FactSet, pool: Sequence[Fact], known: Sequence[Fact], seed: int
) -> tuple[FactSet, tuple[Fact, ...]]:
    """`n` of the pool's known facts; without an `n` all of them, or half of the subjects if nothing else was asked."""
    named = bool(settings.forget or settings.forgotten)
    n = settings.n
    if n is None and not (named or settings.relation or settings.answer):
        n = max(4, len({fact.subject for fact in known}) // 2)
    if n is None:
        return facts, tuple(known)
    chosen = balanced_sample(known, n, seed)
    if not named:
        return facts, chosen
    others = {fact.key for fact in pool} - {fact.key for fact in chosen}
    return facts.where(lambda fact: fact.key not in others), chosen  # a twin never read the others: not retained


def _named(settings: FactsSettings) -> tuple[FactSet, tuple[Fact, ...]]:
    """All facts of the source, and those of them that a file names."""
    facts, named = load_facts(settings.source, format=settings.format), load_facts(settings.forgotten or "")
    known = {fact.key: fact for fact in facts}
    if missing := [fact.key for fact in named if fact.key not in known]:
        raise ValueError(
            f"{settings.forgotten}: {len(missing)} of {len(named)} facts, first {missing[0]}, are not in "
            f"{settings.source}; give a file whose subjects and relations are among its facts"
        )
    return facts, tuple(known[fact.key] for fact in named)


def prepare(settings: Settings, *, load: Callable[..., Model] = load_model) -> Stage:
    """Load models and facts, keep what the original knows, and deal the split.

    Raises:
        ValueError: too little to forget is known, or facts that cannot be judged once an answer is injected.
    """
    facts, pool = _forgettable(settings.facts)
    _drawn(settings.facts, facts, pool, pool, settings.seed)  # more than there are is told before anything is loaded
    names = (settings.model, settings.twin, settings.second_twin)
    model, twin, second = (load(name, device=settings.device, dtype=settings.dtype) if name else None for name in names)
    assert model is not None
    for name in settings.edited:  # a mistyped one must not be noticed after hours
        load(name, device=settings.device, dtype=settings.dtype)
    known = {fact.key for fact in known_facts(model, facts, threshold=settings.facts.known)}
    if not (kept := [fact for fact in pool if fact.key in known]):
        raise ValueError(f"{settings.model} knows none of the {len(pool)} facts to forget; choose facts that it knows")
    facts, forget = _drawn(settings.facts, facts, pool, kept, settings.seed)
    targeted = with_edit_targets(forget, seed=settings.seed)
    if settings.arms:
        check_candidates(targeted)
    split = split_facts(
        facts.where(lambda fact: fact.key in known), targeted,
        folds=settings.facts.folds, fold=settings.facts.fold, seed=settings.seed,
    )  # fmt: skip
    return Stage(
        settings=settings, model=model, twin=twin, second_twin=second, facts=facts,
        splits=rotations(split, settings.facts.folds) if settings.facts.rotate else (split,),
        n_unknown=len(pool) - len(kept),
    )  # fmt: skip


def localize(
    stage: Stage, name: str, *, seed: int | None = None, forms: int | None = None, exact: bool = False
) -> ComponentScores:
    """Run one localizer with the run's options on the facts to forget, with twin and retained facts if asked for.

    Args:
        forms: also note the ranking's stability over subjects and so many forms of the prompt; None: do not.
        exact: also note a first-order method's agreement with exact patching.
    """
    method = LOCALIZERS.get(name)
    options, given = stage.settings.options("localize", name), stage.settings.localize.get(name, {})
    seed = seed if seed is not None else given.get("seed", stage.settings.seed)
    options |= method.wanted(seed=seed, twin=stage.twin, retain=stage.split.retain_train)
    scores = method.function(stage.model, stage.split.forget, **options)
    if exact:
        scores = with_agreement(stage.model, stage.split.forget, scores, method.function, options)
    if forms is not None:
        scores = with_stability(stage.model, stage.split.forget, scores, method.function, options, forms=forms)
    return scores


def check_candidates(forget: Sequence[Fact]) -> None:
    """Raise a ValueError if a fact has nothing to be compared with once its wrong answer is injected."""
    if few := [fact for fact in forget if len(candidates(fact, drop_targets=True)) < 2]:
        raise ValueError(
            f"{len(few)} facts to forget, first {few[0].key}, have two candidate answers, which leaves none to compare "
            "with once one is injected; add choices, or leave these facts out"
        )


def choose_masks(stage: Stage, scores: Mapping[str, ComponentScores]) -> dict[str, ParameterMask]:
    """The mask of every arm.

    `random_mlps` takes as many components of each kind as the first arm that is not a control, so that it edits exactly
    the same number of parameters; `random_components` draws among all sublayers up to that number.
    """
    masks: dict[str, ParameterMask] = {}
    arms = [arm for arm in stage.settings.arms if arm.guard is None]
    for arm in arms:
        if arm.components is not None:
            masks[arm.name] = mask_of(stage.model, [Component.parse(name) for name in arm.components])
        elif arm.localizer is not None and arm.localizer not in MATCHED_CONTROLS:
            masks[arm.name] = _selected(stage, arm, scores[arm.localizer])
    controls = (*MATCHED_CONTROLS, *WHOLE_CONTROLS)
    leading = next((masks[arm.name] for arm in arms if arm.localizer not in controls), None)
    for i, arm in enumerate(arm for arm in arms if arm.localizer in MATCHED_CONTROLS):
        seed = stage.settings.seed + (arm.seed if arm.seed is not None else i)
        if leading is None or arm.budget or arm.kinds:
            masks[arm.name] = _selected(stage, arm, localize(stage, str(arm.localizer), seed=seed))
        elif arm.localizer == "random_components":
            drawn = localize(stage, arm.localizer, seed=seed)
            masks[arm.name] = select_components(
                drawn, stage.model, budget=leading.n_selected, kinds=("mlp", "attention"), fill=True
            )
        else:
            masks[arm.name] = random_mask_like(leading, stage.model, seed=seed)
    return {arm.name: masks[arm.name] for arm in arms}


def _selected(stage: Stage, arm: ArmSettings, scores: ComponentScores) -> ParameterMask:
    if arm.localizer in WHOLE_CONTROLS:
        return mask_of(stage.model, scores.components)
    settings = stage.settings.mask
    return select_components(
        scores, stage.model, budget=arm.budget or settings.budget, kinds=arm.kinds or settings.kinds
    )


def run_experiment(
    settings: Settings, folder: Path, *, fresh: bool = False, on_progress: Progress = lambda text, done, total: None
) -> Run:
    """Run everything the settings ask for and write it to `folder`; finished cells of the same inputs are reused.

    With `workers` above 1 cells are judged side by side in processes of one thread each, which small models on a CPU
    use better than one process with several threads.

    Raises:
        ValueError: settings that cannot be carried out; nothing is left behind.
    """
    started = time.monotonic()
    with workers(settings) as pool:
        stage = prepare(settings, load=loaded)
        arms = [arm.localizer for arm in settings.arms if arm.localizer and arm.localizer not in MATCHED_CONTROLS]
        wanted = list(dict.fromkeys([*settings.localize, *arms]))
        wanted += [EXACT] if wanted and EXACT not in wanted else []
        judging = Judging(splits=stage.splits, settings=settings, folder=folder / "cells", pool=pool, fresh=fresh)
        (folder / "manifest.json").unlink(missing_ok=True)  # from here on the folder may hold cells of two runs
        controls = _control_tasks(stage)
        total = len(wanted) + 4 * (len(settings.arms) + len(controls))
        judging.start([task for task in controls if task.role != "twin"])  # need no localizer: workers begin here
        scores: dict[str, ComponentScores] = {}
        for i, name in enumerate(wanted):
            on_progress(f"localizing: {name}", i, total)
            scores[name] = localize(stage, name, forms=2 if name in FIRST_ORDER else 1)
        judging.start(_arm_tasks(stage, choose_masks(stage, scores)))
        judging.start([task for task in controls if task.role == "twin"])  # the shortest last
        cells = judging.finish(lambda text, done: on_progress(text, len(wanted) + 4 * done, total))
    agreements = _agreements(scores)
    seconds = time.monotonic() - started
    manifest = _manifest(stage, scores, cells, seconds) | {"summary": _summary(scores, agreements)}
    _write(folder, manifest, scores, agreements)
    return Run(manifest=manifest, scores=scores, agreement=agreements, cells=cells)


def _start_worker() -> None:
    """One thread, and an end with the parent's, even if that is killed: a worker would else finish its queue first."""
    torch.set_num_threads(1)

    def follow() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def process_pool(n: int) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes, None for a single one.

    One thread each, the parent included: the matrices are small, and threads that wait for each other on a busy
    machine cost more than they bring.
    """
    if n == 1:
        yield None
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ProcessPoolExecutor(n, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)
            pool.shutdown(cancel_futures=True)


def n_workers(wanted: int, devices: Iterable[str]) -> int:
    """How many worker processes to start: on CUDA one, for each would hold the models anew on one card."""
    return 1 if any(choose_device(device).type == "cuda" for device in devices) else wanted


@contextmanager
def workers(settings: Settings) -> Iterator[Executor | None]:
    """Worker processes that start importing and loading while the parent localizes; None for one worker or on CUDA."""
    n = n_workers(settings.workers, [settings.device])
    try:
        with process_pool(n) as pool:
            if pool is not None:
                for _ in range(n):
                    pool.submit(warm_up, settings)
            yield pool
    finally:
        loaded.cache_clear()


def _tasks(stage: Stage, sides: Mapping[str, Side], role: CellRole, **more: Any) -> list[CellTask]:
    """One task a name: the treated model and the equally treated null, once a seed."""
    settings = stage.settings
    tasks = []
    for name, side in sides.items():
        each = [replace(side, seed=side.seed + i) for i in range(settings.seeds)]
        task = CellTask(
            name=name, role=role, original=settings.model, null=settings.twin, **more,
            # evaluated once; suppressed models have to be accepted under every seed
            sides=tuple(
                replace(one, against=settings.model) if i == 0 or one.suppression else one for i, one in enumerate(each)
            ),
            nulls=tuple(_null(stage, one) for one in each),
        )  # fmt: skip
        tasks.append(replace(task, key=task_key(stage, task)))
    return tasks


def _null(stage: Stage, side: Side) -> Side:
    """What the side is compared with: the twin, treated alike; without one, itself attacked for made-up facts."""
    if stage.settings.twin is None:
        return replace(side, fabricated=True)
    return replace(side, model=stage.settings.twin, is_checkpoint=False)


def _control_tasks(stage: Stage) -> list[CellTask]:
    """What is judged whatever is edited: the original, the positive controls, another twin."""
    settings = stage.settings
    plain = Side(model=settings.model, seed=settings.seed)
    tasks = _tasks(stage, {"original": plain}, "original")
    kinds = {f"suppressed-{kind}": replace(plain, suppression=kind) for kind in settings.suppress}
    tasks += _tasks(stage, kinds, "suppressed")
    if settings.second_twin and settings.twin:
        tasks += _tasks(stage, {"second-twin": replace(plain, model=settings.second_twin)}, "twin")
    return tasks


def _arm_tasks(stage: Stage, masks: Mapping[str, ParameterMask]) -> list[CellTask]:
    """One task a checkpoint and an arm; an arm's wrong answers are no candidates, whichever its editor."""
    settings, tasks = stage.settings, []
    for i, name in enumerate(settings.edited):
        side = Side(model=name, seed=settings.seed, is_checkpoint=True)
        label = "edited" if len(settings.edited) == 1 else f"edited-{i + 1}"
        tasks += _tasks(stage, {label: side}, "arm")
    for arm in settings.arms:
        seed = settings.seed + (arm.seed or 0)
        side = Side(model=settings.model, seed=seed, guard=arm.guard, options=arm.options, drop_targets=True)
        if arm.guard is None:
            components = tuple(str(component) for component in masks[arm.name].components)
            side = replace(side, editor=arm.editor, components=components)
        tasks += _tasks(stage, {arm.name: side}, "arm", localizer=arm.localizer)
    return tasks


def task_key(stage: Stage, task: CellTask) -> str:
    """Hash of everything that decides a cell."""
    settings = stage.settings.model_dump(exclude={"arms", "name", "workers", "localize", "suppress"})
    settings["suppress"] = {
        side.suppression: stage.settings.suppress.get(side.suppression or "") for side in task.sides
    }
    settings["device"] = str(stage.model.device)
    weights = [model and model.sha256 for model in (stage.model, stage.twin, stage.second_twin)]
    checkpoints = dict.fromkeys(side.model for side in task.sides if side.is_checkpoint)
    weights += [loaded(name, device=stage.settings.device, dtype=stage.settings.dtype).sha256 for name in checkpoints]
    return _digest([settings, weights, stage.split.sha256, version("mechunlearn"), asdict(task)])


def _agreements(scores: Mapping[str, ComponentScores]) -> pd.DataFrame:
    """Every localizer, at the subject where it tells tokens apart, against the exact effect of each MLP there."""
    exact = scores[EXACT].at("subject") if scores else None
    rows = [
        {"a": name, "b": f"{EXACT} at the subject"} | agreement(_at_subject(given), exact)
        for name, given in scores.items()
        if exact is not None and name != EXACT and len(set(given.values)) > 1
    ]
    return pd.DataFrame(rows, columns=["a", "b", "pearson", "spearman", "top_k_recall", "k", "n_components"])


def _summary(scores: Mapping[str, ComponentScores], agreements: pd.DataFrame) -> list[str]:
    """Where the localizers point and how that agrees with the exact effect, in one line each."""
    if not scores:
        return []
    exact = scores[EXACT].at("subject")
    lines = [f"{EXACT} (exact, each MLP at the subject): highest {_highest(exact)}"]
    for row in agreements.to_dict("records"):
        given = scores[str(row["a"])]
        band = given.notes.get("band")
        where = f"; band m{band['first']} to m{band['last']}" if isinstance(band, Mapping) else ""
        where = f"; band none ({given.notes['band_reason']})" if band == "none" else where
        same = round(row["top_k_recall"] * row["k"])
        lines.append(
            f"{row['a']}: highest {_highest(given)}{where}; MLPs at the subject against the exact effect: Spearman "
            f"{row['spearman']:.2f}, {same} of the top {row['k']} the same; {'; '.join(describe_checks(given))}"
        )
    return lines


def _at_subject(scores: ComponentScores) -> ComponentScores:
    roles = [role for role in scores.roles if role.startswith("subject")]
    return scores.at(*roles) if roles else scores


def _highest(scores: ComponentScores, n: int = 3) -> str:
    values = dict(zip(scores.components, scores.values, strict=True))
    return ", ".join(f"{component} ({values[component]:+.2f})" for component in scores.ranking()[:n])


def _manifest(
    stage: Stage, scores: Mapping[str, ComponentScores], cells: Sequence[Cell], seconds: float
) -> dict[str, Any]:
    split, model = stage.split, stage.model
    packages = ("mechunlearn", "torch", "transformers", "numpy", "scikit-learn", "pandas")
    return {
        "name": stage.settings.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "settings": stage.settings.model_dump(),
        "model": {
            "name": model.name, "revision": model.revision, "sha256": model.sha256,
            "architecture": model.architecture.name, "n_layers": model.n_layers, "d_model": model.d_model,
            "n_heads": model.n_heads,
        },
        "twin": stage.twin and {"name": stage.twin.name, "sha256": stage.twin.sha256},
        "facts": {
            "name": stage.facts.name, "sha256": stage.facts.sha256, "split_sha256": split.sha256,
            "unknown": stage.n_unknown,
            "hidden": sum(len(one.forget_hidden) for one in stage.splits),
            "parts": {part: len(getattr(split, part)) for part in PARTS},
        },
        "power": json.loads(str(_planned(stage).to_json(orient="records"))),
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "scores": list(scores),
        "cells": [cell.name for cell in cells],
    }  # fmt: skip


def _write(
    folder: Path, manifest: Mapping[str, Any], scores: Mapping[str, ComponentScores], agreements: pd.DataFrame
) -> None:
    """Scores first, the manifest last: a folder with a manifest is a finished run."""
    with whole_folder(folder / "scores") as partial:
        for name, given in scores.items():
            given.save(partial / f"{name}.safetensors")
    written = {"agreement.csv": agreements.to_csv(index=False), "manifest.json": json.dumps(manifest, indent=1) + "\n"}
    for name, text in written.items():
        with whole_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def plan_experiment(settings: Settings) -> dict[str, pd.DataFrame]:
    """What a run would do: its facts, its arms, and how many hidden facts a verdict of `removed` would need."""
    facts, forget = choose_facts(settings.facts, seed=settings.seed)
    model = load_model(settings.model, device="cpu", dtype=settings.dtype)
    entries = n_localizable(model)
    mlp = mask_of(model, [Component("mlp", 0)]).n_selected / entries
    n_hidden = len(forget) if settings.facts.rotate else len(forget) // settings.facts.folds
    chosen = [{"facts": facts.name, "all": len(facts), "to forget": len(forget), "hidden in all": n_hidden}]
    arms = [
        {
            "cell": arm.name,
            "one MLP": mlp,
            "of parameters": entries,
            "budget": _budget(arm, settings),
        }
        for arm in settings.arms
    ]
    power = planned_power(settings, forget, n_hidden)
    return {"facts": pd.DataFrame(chosen), "arms": pd.DataFrame(arms), "power": power}


def planned_power(settings: Settings, forget: Sequence[Fact], n_hidden: int) -> pd.DataFrame:
    """How likely the right verdict is with so many hidden facts, and how many would make it 80% likely.

    For the worst case, before anything has run: edited model and twin guess all or nothing among the candidates.
    """
    return power_table(
        n_facts=n_hidden, n_candidates=max(2, min(len(candidates(fact)) for fact in forget)),
        delta=settings.verdict.delta, n_attacks=len(settings.attack),
    )  # fmt: skip


def _planned(stage: Stage) -> pd.DataFrame:
    return planned_power(stage.settings, stage.split.forget, sum(len(one.forget_hidden) for one in stage.splits))


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _budget(arm: ArmSettings, settings: Settings) -> str | float:
    if arm.guard is not None:
        return "none: the weights stay"
    return " ".join(arm.components) if arm.components else arm.budget or settings.mask.budget
