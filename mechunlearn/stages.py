"""Single stages as the command line offers them: names and folders in, files and a table out."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.attack import ATTACKS
from mechunlearn.components import Component, ComponentScores
from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import applied, export_edit, load_edit, save_edit
from mechunlearn.evaluate import evaluate, take_baseline
from mechunlearn.experiment import Stage, prepare
from mechunlearn.experiment import localize as run_localizer
from mechunlearn.localize import LOCALIZERS
from mechunlearn.masks import mask_of, select_components
from mechunlearn.models import bundled_models
from mechunlearn.organisms.forget_sets import FORGET_SETS
from mechunlearn.registry import Registry
from mechunlearn.runs import whole_folder
from mechunlearn.settings import check_settings, preset_names
from mechunlearn.sources import SOURCES

REGISTRIES: Mapping[str, Registry] = {
    "localizers": LOCALIZERS, "editors": EDITORS, "attacks": ATTACKS, "sources": SOURCES,
}  # fmt: skip


def _stage(model: str, facts: str, *, device: str, twin: str | None = None, **methods: Any) -> Stage:
    chosen = {"forget": facts} if facts in FORGET_SETS else {"source": facts}
    data = {"name": "stage", "model": model, "device": device, "facts": chosen, **methods}
    return prepare(check_settings(data | ({"twin": twin} if twin else {}), "command line"))


def localize(
    model: str, facts: str, method: str, options: Mapping[str, Any], *, twin: str | None, device: str, out: Path
) -> ComponentScores:
    """Score components; writes scores.safetensors and scores.csv into `out`."""
    stage = _stage(model, facts, device=device, twin=twin, localize={method: dict(options)})
    scores = run_localizer(stage, method)
    with whole_folder(out) as folder:
        scores.save(folder / "scores.safetensors")
        scores.to_frame().to_csv(folder / "scores.csv", index=False)
    return scores


def edit(
    model: str,
    facts: str,
    method: str,
    options: Mapping[str, Any],
    *,
    scores: Path | None,
    components: str | None,
    budget: float,
    export: bool,
    device: str,
    out: Path,
) -> pd.DataFrame:
    """Edit the selected components; writes the edit and, if asked, a checkpoint; returns before and after."""
    if (scores is None) == (components is None):
        raise ValueError("edit: give either --scores (a file that `localize` wrote) or --components (such as m2,m3)")
    stage = _stage(model, facts, device=device, edit={method: dict(options)})
    if components is not None:
        mask = mask_of(stage.model, [Component.parse(name.strip()) for name in components.split(",")])
    else:
        mask = select_components(ComponentScores.load(scores or ""), stage.model, budget=budget)
    made = EDITORS.get(method).function(stage.model, mask, stage.split, **stage.settings.options("edit", method))
    baseline = take_baseline(stage.model, stage.split)
    before = evaluate(stage.model, stage.split, original=baseline).table()
    with applied(stage.model, made):
        after = evaluate(stage.model, stage.split, original=baseline).table()
    with whole_folder(out) as folder:
        save_edit(made, folder / "edit.safetensors")
        after.to_csv(folder / "evaluation.csv", index=False)
        if export:
            export_edit(stage.model, made, folder / "checkpoint")
    both = before.merge(after, on=["part", "form", "metric"], suffixes=(" before", " after"))
    return both.loc[:, ["part", "form", "metric", "mean before", "mean after", "n after"]]


def attack(
    model: str, facts: str, method: str, options: Mapping[str, Any], *, edit_folder: Path | None, device: str, out: Path
) -> pd.DataFrame:
    """Attack a model, edited if an edit is given; writes the attack's record and rows."""
    stage = _stage(model, facts, device=device, attack={method: dict(options)})
    with ExitStack() as stack:
        if edit_folder is not None:
            path = edit_folder / "edit.safetensors" if edit_folder.is_dir() else edit_folder
            stack.enter_context(applied(stage.model, load_edit(path)))
        result = ATTACKS.get(method).function(stage.model, stage.split, **stage.settings.options("attack", method))
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


def listing(stage: str | None) -> dict[str, pd.DataFrame]:
    """Everything there is to choose from, by kind."""
    tables: dict[str, Callable[[], pd.DataFrame]] = {name: partial(_methods, r) for name, r in REGISTRIES.items()}
    tables["presets"] = lambda: pd.DataFrame({"name": preset_names()})
    tables["models"] = lambda: pd.DataFrame({"name": bundled_models()})
    tables["forget sets"] = lambda: pd.DataFrame(
        [(name, dataset, (choose.__doc__ or "").strip()) for name, (dataset, choose) in FORGET_SETS.items()],
        columns=pd.Index(["name", "data set", "what"]),
    )
    if stage is not None and stage not in tables:
        raise ValueError(f"list: got {stage!r}, allowed: {', '.join(tables)}")
    return {name: make() for name, make in tables.items() if stage in (None, name)}


def _methods(registry: Registry) -> pd.DataFrame:
    rows = [(method.name, method.summary, method.source) for method in registry.methods()]
    return pd.DataFrame(rows, columns=pd.Index(["name", "what", "source"]))
