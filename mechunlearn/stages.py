"""Single stages as the command line offers them: names and folders in, files and a table out."""

import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch

from mechunlearn.attack import ATTACKS
from mechunlearn.bench.band import bench_band as compare_with_band
from mechunlearn.bench.check import Check, Subjects, check_model
from mechunlearn.bench.coverage import coverage
from mechunlearn.bench.edit_speed import bench_edit_speed as measure_edit_speed
from mechunlearn.bench.knowledge import plain_kinds, trained_kinds
from mechunlearn.bench.planted import PlantedBench
from mechunlearn.bench.planted import bench_planted as score_known_places
from mechunlearn.bench.planted_settings import LocalizerSettings, PlantedSettings
from mechunlearn.bench.speed import bench_speed as measure_speed
from mechunlearn.bench.verdict import QUICK, VerdictBench
from mechunlearn.bench.verdict import bench_verdict as judge_known_truth
from mechunlearn.checkpoints import DType, bundled_models, choose_device, load_model, model_folder, save_model
from mechunlearn.components import Component, ComponentScores
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import applied, save_edit
from mechunlearn.edit.stack import EditStack
from mechunlearn.edit.stack_files import load_stack, write_stack
from mechunlearn.evaluate import drift, evaluate, take_baseline
from mechunlearn.experiment import Stage, prepare, process_pool
from mechunlearn.experiment import localize as run_localizer
from mechunlearn.facts import FactSplit
from mechunlearn.features import GUARDS
from mechunlearn.features.deletion import CodeDeletion, erase_codes
from mechunlearn.features.guard import Guard
from mechunlearn.features.guard_files import load_from, save_in
from mechunlearn.features.selection import FEATURE_RULES
from mechunlearn.files import replaceable, whole_folder
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.edges import EdgeScores, edge_attribution_patching
from mechunlearn.masks import ParameterMask, mask_of, select_components
from mechunlearn.organisms.bundle import ORGANISMS, ORIGINAL, TWIN, train_organism
from mechunlearn.organisms.card import read_card, write_card
from mechunlearn.organisms.forget_sets import FORGET_SETS, never_known
from mechunlearn.organisms.planted import Recipe as PlantedRecipe
from mechunlearn.organisms.planted import make_base, make_plant
from mechunlearn.organisms.sweep import sweep as train_and_check
from mechunlearn.registry import Method, Registry, did_you_mean
from mechunlearn.report.bench import bench_figure
from mechunlearn.report.check import check_figure, sweep_figure, training_figure
from mechunlearn.report.circuits import circuit
from mechunlearn.report.methods import methods_figure, methods_table, numbers
from mechunlearn.report.planted import planted_figure
from mechunlearn.runs import load_run
from mechunlearn.settings import DECIDING_ATTACKS, Settings, check_settings, preset_names, run_settings
from mechunlearn.sources import SOURCES
from mechunlearn.sources.bundled import BUNDLED, load_templates
from mechunlearn.sources.loading import load_facts
from mechunlearn.splits import load_splits, save_splits, split_after, together
from mechunlearn.study.settings import load_study, load_study_model, study_models, study_presets

CHECKPOINT_ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "relearning": {
        "kinds": ["full", "lora:8"], "learning_rates": [1e-4, 3e-4, 1e-3], "steps": 60, "report_all_forms": True,
    },
}  # fmt: skip
"""Options of `attack --original` that differ from the attacks' own: every control runs it, too, so it is smaller."""

DTYPES = tuple(name for name in get_args(DType) if name != "auto")

BUDGET = 0.2  # of MLP and attention parameters, for an edit of what was localized
REGISTRIES: Mapping[str, Registry] = {
    "localizers": LOCALIZERS, "editors": EDITORS, "guards": GUARDS, "feature rules": FEATURE_RULES, "attacks": ATTACKS,
    "suppressions": SUPPRESSIONS, "sources": SOURCES,
}  # fmt: skip


def chosen(facts: str, forgotten: str | None = None) -> dict[str, str]:
    """The [facts] of a forget set's name, or of a data set's with or without a file of those to be forgotten.

    Raises:
        ValueError: a file beside a forget set.
    """
    if facts in FORGET_SETS:
        if forgotten is not None:
            raise ValueError(
                f"--forgotten: got {forgotten} beside --facts {facts}, a forget set; leave one of them out"
            )
        return {"forget": facts}
    return {"source": facts} | ({"forgotten": forgotten} if forgotten else {})


def _stage(model: str, facts: Mapping[str, str], *, device: str, twin: str | None = None, **methods: Any) -> Stage:
    data = {"name": "stage", "model": model, "device": device, "facts": dict(facts), **methods}
    return prepare(check_settings(data | ({"twin": twin} if twin else {}), "command line"))


def localize(
    model: str, facts: Mapping[str, str], method: str, options: Mapping[str, Any], *,
    twin: str | None, device: str, forms: int, exact: bool, out: Path,
) -> ComponentScores:  # fmt: skip
    """Score components; writes scores.safetensors and scores.csv into `out`.

    Args:
        forms, exact: what is noted beside the scores, see `experiment.localize`.
    """
    replaceable(out)
    stage = _stage(model, facts, device=device, twin=twin, localize={method: dict(options)})
    scores = run_localizer(stage, method, forms=forms, exact=exact)
    with whole_folder(out) as folder:
        scores.save(folder / "scores.safetensors")
        scores.to_frame().to_csv(folder / "scores.csv", index=False)
    return scores


def edges(model: str, facts: Mapping[str, str], options: Mapping[str, Any], *, device: str, out: Path) -> EdgeScores:
    """Score the edges between components; writes edges.csv and circuit.html, the strongest of them, into `out`.

    The circuit shows those on a path from the embedding to the answer, or all of the strongest where none is on one.
    """
    replaceable(out)
    checked = Method(name="edges", kind="stage", function=edge_attribution_patching, source="").validate(options)
    stage = _stage(model, facts, device=device)
    found = edge_attribution_patching(stage.model, stage.split.forget, **checked)
    try:
        drawn = circuit(found)
    except ValueError:
        drawn = circuit(found, paths_only=False)
    with whole_folder(out) as folder:
        found.to_frame().to_csv(folder / "edges.csv", index=False)
        drawn.write_html(folder / "circuit.html")
    return found


def edit(
    model: str,
    facts: Mapping[str, str],
    method: str,
    options: Mapping[str, Any],
    *,
    scores: Path | None,
    components: str | None,
    budget: float | None,
    export: bool,
    device: str,
    out: Path,
    on: Path | None = None,
) -> tuple[ParameterMask, pd.DataFrame, pd.DataFrame | None]:
    """Edit the selected components; writes the edit, its splits.json and, if asked, a checkpoint.

    Args:
        on: what an earlier `edit` wrote: the new edit is made on top, and `out` holds the stack of all and drift.csv.

    Returns:
        What was edited; the model before and after this edit; and with `on` the drift over all edits.
    """
    replaceable(out)
    if (scores is None) == (components is None):
        raise ValueError("edit: give either --scores (a file that `localize` wrote) or --components (such as m2,m3)")
    if components is not None and budget is not None:
        raise ValueError(
            f"edit: got --budget {budget} beside --components, which are all edited; leave one of them out"
        )
    earlier = load_stack(on) if on is not None else None
    splits = _splits_beside(on) if on is not None else ()
    stage = _stage(model, facts, device=device, edit={method: dict(options)})
    if again := {fact.key for one in splits for fact in one.forget} & {fact.key for fact in stage.split.forget}:
        raise ValueError(
            f"edit: {len(again)} of {len(stage.split.forget)} facts, first {min(again)}, were forgotten by an earlier "
            f"edit in {on}; give other ones (--forgotten)"
        )
    split = split_after(stage.split, splits)
    stack = earlier if earlier is not None else EditStack.of(stage.model)
    baseline = take_baseline(stage.model, split)
    measure = partial(evaluate, stage.model, split, original=baseline, drop_targets=True)
    with stack.applied(stage.model):
        if components is not None:
            mask = mask_of(stage.model, [Component.parse(name.strip()) for name in components.split(",")])
        else:
            share = BUDGET if budget is None else budget
            mask = select_components(ComponentScores.load(scores or ""), stage.model, budget=share)
        before = measure().table()
        made = EDITORS.get(method).function(stage.model, mask, split, **stage.settings.options("edit", method))
        with applied(stage.model, made):
            now = measure().table()
    stack, splits = replace(stack, edits=(*stack.edits, made)), (*splits, split)
    drifted = drift(stage.model, stack, splits, drop_targets=True) if on is not None else None
    with whole_folder(out) as folder:
        if drifted is None:
            save_edit(made, folder / "edit.safetensors")
        else:
            write_stack(stack, folder)
            drifted.to_csv(folder / "drift.csv", index=False)
        save_splits(splits, folder / "splits.json")
        now.to_csv(folder / "evaluation.csv", index=False)
        if export:
            stack.export(stage.model, folder / "checkpoint")
    return mask, _side_by_side(before, now), drifted


def guard(
    model: str, facts: Mapping[str, str], method: str, options: Mapping[str, Any], *, device: str, out: Path
) -> pd.DataFrame:
    """Make a guard of activations, or delete codes; writes it, its splits.json and evaluation.csv into `out`.

    Returns:
        The model before and inside the guard.

    Raises:
        NothingFound: no feature or code belongs to the facts.
    """
    replaceable(out, read=[model])
    stage = _stage(model, facts, device=device, guard={method: dict(options)})
    measure = partial(evaluate, stage.model, stage.split, original=take_baseline(stage.model, stage.split))
    made = GUARDS.get(method).function(stage.model, stage.split, **stage.settings.options("guard", method))
    before = measure().table()
    with applied(stage.model, made):
        now = measure().table()
    with whole_folder(out) as folder:
        save_in(folder, made)
        save_splits([stage.split], folder / "splits.json")
        now.to_csv(folder / "evaluation.csv", index=False)
    return _side_by_side(before, now)


def export(model: str, folder: Path, out: Path, *, device: str) -> None:
    """Write the model as a folder's edits change it, or without the codes of its deletion: they are erased for good.

    The codes alone: who takes the codebook out has the model around it, which no deletion touches.

    Raises:
        ValueError: a guard, which is no part of a model folder; edits of another model, codes of another codebook.
    """
    made = load_from(folder)
    if isinstance(made, Guard):
        raise ValueError(f"export: {folder} holds a guard, which changes no weight and is kept beside the model")
    loaded = load_model(model, device=device)
    if isinstance(made, CodeDeletion):
        erase_codes(loaded, made)
        save_model(loaded, out)
    else:
        load_stack(folder).export(loaded, out)


def _side_by_side(before: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    both = before.merge(now, on=["part", "form", "metric"], suffixes=(" before", " after"))
    return both.loc[:, ["part", "form", "metric", "mean before", "mean after", "n after"]]


def undo(folder: Path, *, keep: int, out: Path) -> int:
    """Write the first `keep` edits of a stack that `edit --on` wrote into `out`; returns how many were undone."""
    replaceable(out)
    stack, splits = load_stack(folder), _splits_beside(folder)
    if len(stack) < 2:
        raise ValueError(f"undo: {folder} holds a single edit; the model without it is the original")
    if not 1 <= keep < len(stack):
        some = "1" if len(stack) == 2 else f"1 to {len(stack) - 1}"
        raise ValueError(f"undo: got --keep {keep}, allowed: {some} of the {len(stack)} edits in {folder}")
    found = folder / "drift.csv"
    drifted = pd.read_csv(found, keep_default_na=False) if found.is_file() else None
    with whole_folder(out) as partial_folder:
        write_stack(stack.undo(len(stack) - keep), partial_folder)
        save_splits(splits[:keep], partial_folder / "splits.json")
        if drifted is not None:
            rows = drifted.loc[(drifted["step"] <= keep) & (drifted["block"] <= keep)]
            rows.to_csv(partial_folder / "drift.csv", index=False)
    return len(stack) - keep


def _splits_beside(path: Path) -> tuple[FactSplit, ...]:
    """What the edits of a folder, or of a file in it, forgot and retained."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "splits.json").is_file():
        raise FileNotFoundError(f"{folder} has no splits.json, which says what its edits forgot; make the edit anew")
    return load_splits(folder / "splits.json")


def checkpoint_settings(
    model: str,
    original: str,
    facts: Mapping[str, str],
    method: str | None,
    changes: Mapping[str, Any],
    *,
    twin: str | None,
    device: str,
    name: str,
) -> Settings:
    """The run that judges a checkpoint any tool made of another: every attack (or one) and every positive control.

    Raises:
        ValueError: options that a run does not have; facts of which none are said to be forgotten.
    """
    attacks = {each: dict(CHECKPOINT_ATTACKS.get(each, {})) for each in ([method] if method else DECIDING_ATTACKS)}
    data: dict[str, Any] = {
        "name": re.sub(r"[^\w.-]+", "-", name).strip("-._") or "attack", "model": original, "edited": [model],
        "device": device, "workers": min(2, os.cpu_count() or 1), "facts": dict(facts), "attack": attacks,
    }  # fmt: skip
    data |= {"twin": twin} if twin else {}
    settings = run_settings(data, changes, "command line")
    if not (settings.facts.forget or settings.facts.forgotten or settings.facts.relation):
        raise ValueError(
            f"attack: got --original and --facts {settings.facts.source}, which do not say what was forgotten; give "
            "--forgotten FILE, a forget set (`mechunlearn list`), or --set facts.relation=NAME"
        )
    return settings


def attack(
    model: str,
    facts: Mapping[str, str] | None,
    method: str,
    options: Mapping[str, Any],
    *,
    edit_folder: Path | None,
    twin: str | None,
    device: str,
    out: Path,
) -> pd.DataFrame:
    """Attack a model, inside an edit, a stack of them, a guard or a deletion if given; writes the attack's record.

    As in a run, an edit's wrong answers are dropped from the candidates unless the options say otherwise. Attacked for
    the facts that a forget set or a file names; without either, for all that the edits in the folder forgot. Without
    facts the folder's splits.json says all of them.

    Raises:
        FileNotFoundError: no such folder of an edit.
        ValueError: an edit, and nothing that says what it forgot; or no facts and no edit.
    """
    replaceable(out, read=[model, edit_folder])
    if edit_folder is not None and not edit_folder.exists():
        raise FileNotFoundError(f"--edit: no folder {edit_folder}; give one that `edit` or `guard` wrote")
    if twin is not None:
        raise ValueError("attack: got --twin without --original; a twin is for the verdict on a checkpoint")
    says = bool(facts and (facts.get("forget") or facts.get("forgotten")))
    kept = edit_folder is not None and (edit_folder / "splits.json").is_file()
    if edit_folder is not None and not (says or kept):
        named = f"--facts {facts['source']}" if facts else "no --facts"
        raise ValueError(
            f"attack: neither {edit_folder} (no splits.json) nor {named} says what was forgotten; give the facts that "
            "were (--forgotten)"
        )
    given = {"drop_targets": edit_folder is not None, **options}
    earlier = _splits_beside(edit_folder) if edit_folder is not None and kept else ()
    if facts:
        stage = _stage(model, facts, device=device, attack={method: given})
        loaded, split, checked = stage.model, stage.split, stage.settings.options("attack", method)
        if earlier:  # what another edit of the stack forgot is nothing to retain
            split = split_after(split, earlier) if says else together(earlier)
    elif earlier:
        checked = ATTACKS.get(method).validate(given)
        loaded, split = load_model(model, device=device), together(earlier)
    else:
        raise ValueError("attack: got neither facts nor an edit that says which it forgot; give --facts")
    with ExitStack() as inside:
        if edit_folder is not None:
            made = load_from(edit_folder)
            if isinstance(made, Guard) and made.base_sha256 != loaded.sha256:
                warnings.warn(
                    f"the guard in {edit_folder} was made on '{made.base_name}', and {model} has other weights",
                    stacklevel=2,
                )
            inside.enter_context(applied(loaded, made) if made else load_stack(edit_folder).applied(loaded))
        result = ATTACKS.get(method).function(loaded, split, **checked)
    with whole_folder(out) as folder:
        result.save(folder / method)
    before, after = result.hidden_before(), result.hidden_scores()
    return pd.DataFrame(
        [
            {
                "hidden facts": len(after), "P(true) before": sum(before.values()) / len(before),
                "P(true) after": sum(after.values()) / len(after), "chosen": result.chosen, "step": result.chosen_step,
                "health": result.health.reason or "ok",
            }
        ]
    )  # fmt: skip


def train(
    name: str, folder: Path, *, device: str, tokens: int | None, on_step: Callable[[str, int, int], None]
) -> Path:
    """Train a bundled organism into `folder`; training.html shows the curve from the first checkpoint on."""
    if name not in ORGANISMS:
        raise ValueError(f"unknown organism {name!r}.{did_you_mean(name, tuple(ORGANISMS))}")
    recipe, _ = ORGANISMS[name]
    recipe = replace(recipe, tokens=tokens) if tokens else recipe
    return train_organism(
        name, folder, device=str(choose_device(device)), recipe=recipe,
        on_step=lambda step, loss: on_step(f"{name}: loss {loss:.3f}", step, recipe.steps),
        on_checkpoint=lambda curve: training_figure(pd.read_csv(curve)).write_html(curve.with_suffix(".html")),
    )  # fmt: skip


def sweep(out: Path, *, device: str, on_step: Callable[[str, int, int], None]) -> pd.DataFrame:
    """Train and check the recipes of `organisms.sweep`; writes sweep.csv and sweep.html."""
    rows = train_and_check(out / "sweep.csv", device=str(choose_device(device)), on_step=on_step)
    sweep_figure(rows).write_html(out / "sweep.html")
    return rows


def check(
    name: str,
    facts: Sequence[str] | None,
    *,
    twin: str | None,
    device: str,
    out: Path,
    card: bool = False,
    on_step: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> tuple[Check, Path]:
    """Check a model's knowledge and lookup; writes check.csv, its tables and check.html into a folder of `out`."""
    folder = model_folder(name)
    slug = re.sub(r"[^\w.]+", "-", folder.resolve().name if folder else name).strip("-.")
    target = replaceable(out / (slug or "model"))
    if folder and target in (folder.resolve(), *folder.resolve().parents):  # one that `organism train` made
        raise ValueError(f"--out: got {out}, but the check would replace {target}, the model's own; choose another")
    trained = read_card(folder) if folder else None
    if card and trained is None:
        raise ValueError(f"--card: got {name!r}, allowed: an organism that `organism train` wrote")
    model = load_model(name, device=device)
    is_twin = trained is not None and not trained["read_the_default_forget_sets"]
    if twin is None and trained is not None and not is_twin and TWIN in bundled_models():
        twin = TWIN
    of_twin = read_card(twin_folder) if twin and (twin_folder := model_folder(twin)) else None
    sets = facts or (trained["recipe"]["datasets"] if trained else BUNDLED)
    groups = [
        Subjects(
            dataset=Path(source).stem if source not in BUNDLED else source,
            facts=tuple(load_facts(source)),
            kinds=trained_kinds(load_templates(source)) if trained and source in BUNDLED else plain_kinds(),
        )
        for source in sets
    ]
    found = check_model(
        model, groups, twin=load_model(twin, device=device) if twin else None,
        unread=never_known() if of_twin and not of_twin["read_the_default_forget_sets"] else None,
        original=load_model(ORIGINAL, device=device) if is_twin else None, on_step=on_step,
    )  # fmt: skip
    with whole_folder(target) as partial:
        found.criteria.to_csv(partial / "check.csv", index=False)
        found.knowledge.to_csv(partial / "knowledge.csv", index=False)
        found.readable.to_csv(partial / "readable.csv", index=False)
        for kind in ("choice", "ablations", "knockouts"):
            frames = [getattr(m, kind).assign(dataset=dataset) for dataset, m in found.mechanisms.items()]
            if frames:
                pd.concat(frames).to_csv(partial / f"{kind}.csv", index=False)
        check_figure(found).write_html(partial / "check.html")
    if card and folder is not None:
        write_card(folder, found)
    return found, target


def bench_verdict(
    settings: Settings,
    out: Path,
    *,
    seeds: int,
    quick: bool,
    fresh: bool,
    on_progress: Callable[[str, float, float], None],
) -> VerdictBench:
    """Judge models of known truth; writes tables/*.csv and tables/bench.html into `out`."""
    replaceable(out / "tables")
    found = judge_known_truth(
        settings, out, seeds=seeds, only=QUICK if quick else (), fresh=fresh, on_progress=on_progress
    )
    with whole_folder(out / "tables") as partial:
        found.verdicts.to_csv(partial / "verdicts.csv", index=False)
        found.power.to_csv(partial / "power.csv", index=False)
        found.goals().to_csv(partial / "goals.csv", index=False)
        bench_figure(found).write_html(partial / "bench.html")
    return found


def bench_planted(
    settings: PlantedSettings, out: Path, *, on_progress: Callable[[str, float, float], None]
) -> PlantedBench:
    """Localize in models of known place; writes ladder/ (reused), tables/*.csv and tables/planted.html into `out`."""
    replaceable(out / "tables")
    found = score_known_places(settings, _ladder(settings, out / "ladder", on_progress), on_progress=on_progress)
    with whole_folder(out / "tables") as partial:
        for name in ("ladder", "rows", "summary", "differences"):
            getattr(found, name).to_csv(partial / f"{name}.csv", index=False)
        planted_figure(found).write_html(partial / "planted.html")
    return found


def _ladder(settings: PlantedSettings, out: Path, on_progress: Callable[[str, float, float], None]) -> list[Path]:
    """Train what is not there yet of the bases and their plants."""
    made = Method(name="ladder", kind="stage", function=PlantedRecipe, source="").validate(settings.ladder)
    options = {name: made[name] for name in settings.ladder}
    recipes = [
        PlantedRecipe(**options | {"architecture": architecture, "seed": seed})
        for architecture in settings.architectures
        for seed in range(settings.seeds)
    ]
    wanted = [(recipe, part) for recipe in recipes for part in settings.plants]
    total = len(recipes) + len(wanted)
    with process_pool(settings.workers) as pool:
        run = map if pool is None else pool.map
        folders: dict[str, Path] = {}
        for recipe, folder in zip(recipes, run(make_base, recipes, [out] * len(recipes)), strict=True):
            folders[recipe.name] = folder
            on_progress(f"base {recipe.name}", len(folders), total)
        plants: list[Path] = []
        homes, whose, parts = zip(*((folders[recipe.name], recipe, part) for recipe, part in wanted), strict=True)
        for path in run(make_plant, homes, whose, parts):
            plants.append(path)
            on_progress(f"plant {path.stem} in {path.parent.parent.name}", len(folders) + len(plants), total)
    return plants


def compare(folders: Sequence[Path], out: Path) -> pd.DataFrame:
    """Compare finished runs; writes methods.csv (numbers with bounds) and methods.html into `out`.

    Raises:
        FileNotFoundError: a folder that is no finished run.
        ValueError: runs about different facts.
    """
    replaceable(out)
    table = methods_table([load_run(folder) for folder in folders])
    with whole_folder(out) as partial:
        numbers(table).to_csv(partial / "methods.csv", index=False)
        methods_figure(table).write_html(partial / "methods.html")
    return table


def bench_band(
    model: str, facts: Mapping[str, str], lines: Sequence[LocalizerSettings], *,
    twin: str | None, max_facts: int, device: str, out: Path, on_progress: Callable[[str, float, float], None],
) -> pd.DataFrame:  # fmt: skip
    """Compare every localizer with the band of MLPs that ablation shows; writes band.csv into `out`."""
    replaceable(out)
    stage = _stage(model, facts, device=device, twin=twin)
    table = compare_with_band(
        stage.model, stage.split.forget, stage.split.retain_train[: len(stage.split.forget)], lines, twin=stage.twin,
        max_facts=max_facts, on_progress=on_progress,
    )  # fmt: skip
    with whole_folder(out) as partial:
        table.to_csv(partial / "band.csv", index=False)
    return table


def bench_speed(
    sizes: Sequence[str], out: Path, *, device: str, dtype: str, rounds: int, memory_only: bool,
    on_progress: Callable[[str, float, float], None],
) -> pd.DataFrame:  # fmt: skip
    """Measure the localizers' costs on random models; writes speed.csv, with date and device, into `out`.

    Raises:
        ValueError: an unknown size or number format.
    """
    replaceable(out)
    where, kept_as = _device_and_dtype(device, dtype)
    table = measure_speed(
        sizes, device=str(where), dtype=kept_as, rounds=rounds, memory_only=memory_only, on_progress=on_progress
    )
    return _save_speed(table, out / "speed.csv", where, dtype)


def bench_edit_speed(
    sizes: Sequence[str], out: Path, *, device: str, dtype: str, rounds: int,
    on_progress: Callable[[str, float, float], None],
) -> pd.DataFrame:  # fmt: skip
    """Measure steps of localized training on random models; writes edit_speed.csv, with date and device, into `out`.

    Raises:
        ValueError: an unknown size or number format.
    """
    replaceable(out)
    where, kept_as = _device_and_dtype(device, dtype)
    table = measure_edit_speed(sizes, device=str(where), dtype=kept_as, rounds=rounds, on_progress=on_progress)
    return _save_speed(table, out / "edit_speed.csv", where, dtype)


def _device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    return choose_device(device), getattr(torch, dtype)


def _save_speed(table: pd.DataFrame, path: Path, where: torch.device, dtype: str) -> pd.DataFrame:
    """Note beside the ratios what they were measured on."""
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"
    table = table.assign(device=name, dtype=dtype, threads=torch.get_num_threads(), date=date.today().isoformat())
    with whole_folder(path.parent) as partial:
        table.to_csv(partial / path.name, index=False)
    return table


def bench_coverage(draws: int, out: Path) -> pd.DataFrame:
    """Simulate the coverage of every interval; writes coverage.csv into `out`."""
    replaceable(out)
    table = coverage(draws=draws)
    with whole_folder(out) as partial:
        table.to_csv(partial / "coverage.csv", index=False)
    return table


def listing(stage: str | None) -> dict[str, pd.DataFrame]:
    """Everything there is to choose from, by kind; or the options of a method.

    Raises:
        ValueError: neither a kind nor a method.
    """
    tables: dict[str, Callable[[], pd.DataFrame]] = {name: partial(_methods, r) for name, r in REGISTRIES.items()}
    tables["presets"] = lambda: pd.DataFrame({"name": preset_names()})
    tables["study presets"] = _studies
    tables["study models"] = _study_models
    tables["models"] = lambda: pd.DataFrame({"name": bundled_models()})
    tables["forget sets"] = lambda: pd.DataFrame(
        [(name, dataset, (choose.__doc__ or "").strip()) for name, (dataset, choose) in FORGET_SETS.items()],
        columns=pd.Index(["name", "data set", "what"]),
    )
    if stage is not None and stage not in tables:
        for registry in REGISTRIES.values():
            if stage in registry.names():
                return {f"options of {stage}": _options(registry.get(stage))}
        raise ValueError(f"list: got {stage!r}, allowed: the name of a method, {', '.join(tables)}")
    return {name: make() for name, make in tables.items() if stage in (None, name)}


def _options(method: Method) -> pd.DataFrame:
    defaults = method.defaults()
    rows = [(name, repr(defaults[name]) if name in defaults else "(required)", said)
            for name, said in method.described().items()]  # fmt: skip
    return pd.DataFrame(rows, columns=pd.Index(["option", "default", "what"]))


def _studies() -> pd.DataFrame:
    columns = pd.Index(["name", "task", "facts to forget", "blocks", "model"])
    studies = [load_study(name)[0] for name in study_presets()]
    rows = [(study.name, study.task, study.n or "all", study.blocks, study.model) for study in studies]
    return pd.DataFrame(rows, columns=columns)


def _study_models() -> pd.DataFrame:
    columns = pd.Index(["name", "loads", "twin", "tasks"])
    models = map(load_study_model, study_models())
    rows = [(model.name, model.model, model.twin or "none", ", ".join(model.tasks)) for _, model in models]
    return pd.DataFrame(rows, columns=columns)


def _methods(registry: Registry) -> pd.DataFrame:
    rows = [(method.name, method.summary, method.source) for method in registry.methods()]
    return pd.DataFrame(rows, columns=pd.Index(["name", "what", "source"]))
