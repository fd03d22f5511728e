"""One job: edit a model, measure it, attack it, and leave a folder that is never made twice."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult
from mechunlearn.components import Component, ComponentScores
from mechunlearn.controls import SUPPRESSIONS
from mechunlearn.controls.acceptance import Acceptance, accept
from mechunlearn.controls.fabricated import fabricated_split
from mechunlearn.edit import EDITORS
from mechunlearn.edit.budget import set_aside
from mechunlearn.edit.edits import WeightEdit, applied
from mechunlearn.edit.training import Diverged
from mechunlearn.evaluate import Baseline, Evaluation, evaluate, take_baseline
from mechunlearn.evaluate.capability import capability_rows
from mechunlearn.facts import Fact, FactSplit, with_edit_targets
from mechunlearn.files import whole_folder
from mechunlearn.masks import ParameterMask, mask_of
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.selection import select_exactly
from mechunlearn.study.deals import Deal, dealt
from mechunlearn.study.settings import ModelSettings, StudySettings

Level = Literal["tune", "quick", "standard"]
N_EVALUATED = 48  # facts of a part
Side = Literal["model", "twin", "made-up"]
"""What is edited and attacked; "made-up": the model, attacked for made-up facts, where there is no twin."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides one job's result."""

    study: StudySettings
    model: ModelSettings
    seed: int
    on: Side = "model"
    level: Level = "quick"
    blocks: tuple[tuple[str, ...], ...] = ()
    """Components of each block, best first; none: the model as it is."""
    n_entries: int | None = None
    """Cut the components to so many entries."""
    editor: str = "inject"
    options: Mapping[str, Any] = field(default_factory=dict)
    suppression: str | None = None
    """A positive control in place of an edit."""
    false_labels: bool = False
    """Relearn wrong answers, as the paper's CounterFact attack did; see `with_false_labels`."""

    @property
    def attacks(self) -> Mapping[str, Mapping[str, Any]]:
        """The attacks of its level, with their options."""
        attacks = {"tune": {}, "quick": self.model.quick, "standard": self.model.standard}[self.level]
        return {"relearning": attacks["relearning"]} if self.false_labels else attacks

    @property
    def digest(self) -> str:
        """Equal for jobs that give the same result, whatever arm or preset asks for them; defaults count as given."""
        task = self.model.tasks[self.study.task].facts.model_dump(), self.model.tasks[self.study.task].target
        method = SUPPRESSIONS.get(self.suppression) if self.suppression else EDITORS.get(self.editor)
        attacks = {name: ATTACKS.get(name).validate(given) for name, given in self.attacks.items()}
        data = [
            self.model.model, self.model.twin, self.model.dtype, task, self.study.n, self.study.blocks, self.seed,
            self.on, self.level, attacks, self.blocks, self.n_entries, self.editor, method.validate(self.options),
            self.suppression, self.false_labels, self.model.side_effects, self.model.capability, version("mechunlearn"),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def edit_digest(self) -> str:
        """Equal for jobs that look at the same edited model."""
        on: Side = "twin" if self.on == "twin" else "model"
        return replace(self, level="tune", false_labels=False, on=on).digest


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a job found."""

    record: Mapping[str, Any]
    """components, n_selected, options, notes of the edit, `hidden_p_true` (mean over the hidden facts by prompt, among
    all candidates and among those that are not the wrong answer), seconds, ..."""
    evaluation: Evaluation | None
    attacks: tuple[AttackResult, ...]

    @classmethod
    def load(cls, folder: Path) -> "Outcome":
        """Read a job's folder."""
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return cls(
            record=record,
            evaluation=Evaluation.load(folder / "evaluation") if record["evaluated"] else None,
            attacks=tuple(AttackResult.load(folder / name) for name in record["attacks"]),
        )


def is_done(job: Job, home: Path) -> bool:
    """Whether the job's folder is there."""
    return (home / job.digest / "record.json").is_file()


def carry_out(jobs: Sequence[Job], home: Path) -> None:
    """Do those of the jobs that are not done; each leaves the folder of its digest in `home`.

    The jobs share one edit, which is made once; so is an attack that several of them ask for. A trial of the tuner
    that diverges is a trial without a score.
    """
    todo = [job for job in jobs if not is_done(job, home)]
    if not todo:
        return
    started, first = time.monotonic(), todo[0]
    deal = dealt(first.study.model_dump_json(), first.model.model_dump_json(), first.seed)
    model = deal.twin if first.on == "twin" else deal.model
    if model is None:
        raise ValueError(f"study {first.study.name}: model '{first.model.name}' has no twin")
    baseline = take_baseline(model, deal.split) if any(map(_is_evaluated, todo)) else None
    attacked: dict[str, AttackResult] = {}
    with ExitStack() as stack:
        try:
            edits, acceptance = _edits(first, deal, model, stack)
        except Diverged as error:
            if any(job.level != "tune" for job in todo):
                raise
            seconds = round(time.monotonic() - started, 1)
            _save(first, home, None, [], {"diverged": str(error), "score": {}, "notes": [], "seconds": seconds})
            return
        made: dict[str, Any] = {
            "components": [list(block) for block in first.blocks], "options": dict(first.options),
            "n_selected": [edit.mask.n_selected for edit in edits], "notes": [dict(edit.notes) for edit in edits],
            "loss": [edit.history[-1] for edit in edits if edit.history],
        }  # fmt: skip
        if acceptance is not None:
            made["acceptance"] = acceptance.record
        for job in todo:
            evaluation, results, found = _look(job, deal, model, baseline, attacked)
            _save(job, home, evaluation, results, found | made | {"seconds": round(time.monotonic() - started, 1)})
            started = time.monotonic()


def _is_evaluated(job: Job) -> bool:
    return job.on == "model" and job.level == "quick" and not job.false_labels


def _look(
    job: Job, deal: Deal, model: Model, baseline: Baseline | None, attacked: dict[str, AttackResult]
) -> tuple[Evaluation | None, list[AttackResult], dict[str, Any]]:
    """Measure and attack the edited model as the job says; `attacked` keeps what was done on it before."""
    split = fabricated_split(deal.split, seed=job.seed) if job.on == "made-up" else deal.split
    split = with_false_labels(split, job.seed) if job.false_labels else split
    is_edited, evaluation, results = bool(job.blocks), None, []
    if baseline is not None and _is_evaluated(job):
        evaluation = measure(model, deal, baseline=baseline, seed=job.seed, capability=job.model.capability)
    for name, given in job.attacks.items():
        method = ATTACKS.get(name)
        options = method.validate(given) | {"seed": job.seed, "drop_targets": is_edited}
        key = json.dumps([name, options, job.on, job.false_labels], sort_keys=True, default=str)
        if key not in attacked:
            attacked[key] = replace(method.function(model, split, **options), fold=split.fold)
        results.append(attacked[key])
    record: dict[str, Any] = {"score": tuning_score(model, deal.split)} if job.level == "tune" else {}
    levels = [mean_of(model, split.forget_hidden, drop_targets=drop)["p_true"] for drop in (False, True)]
    return evaluation, results, record | {"hidden_p_true": dict(zip(("all", "without target"), levels, strict=True))}


def _save(
    job: Job, home: Path, evaluation: Evaluation | None, results: Sequence[AttackResult], found: Mapping[str, Any]
) -> None:
    about = {"digest": job.digest, "seed": job.seed, "on": job.on, "level": job.level}
    listed = {"evaluated": evaluation is not None, "attacks": [result.attack for result in results]}
    with whole_folder(home / job.digest) as partial:
        if evaluation is not None:
            evaluation.save(partial / "evaluation")
        for result in results:
            result.save(partial / result.attack)
        text = json.dumps({**about, **found, **listed}, indent=1)
        (partial / "record.json").write_text(text, encoding="utf-8")


def _edits(job: Job, deal: Deal, model: Model, stack: ExitStack) -> tuple[list[WeightEdit], Acceptance | None]:
    """Make and apply the job's edits, block by block, each on what the ones before left; is a suppression accepted?"""
    if job.suppression is not None:
        edit = SUPPRESSIONS.get(job.suppression).function(model, deal.split, **job.options, seed=job.seed)
        acceptance = accept(model, deal.split, edit) if job.on != "twin" else None
        stack.enter_context(applied(model, edit))
        return [edit], acceptance
    made: list[WeightEdit] = []
    for components, split in zip(job.blocks, deal.blocks, strict=False):
        mask = exact_mask(model, components, job.n_entries)
        edit = EDITORS.get(job.editor).function(model, mask, split, **job.options, seed=job.seed)
        stack.enter_context(applied(model, edit))
        made.append(edit)
    return made, None


def exact_mask(model: Model, components: Sequence[str], n_entries: int | None) -> ParameterMask:
    """The mask of the components, best first, the last of them cut so that it has exactly `n_entries`; None: whole.

    Raises:
        ValueError: components that hold fewer entries.
    """
    named = tuple(Component.parse(name) for name in components)
    if n_entries is None:
        return mask_of(model, named)
    order = np.arange(len(named), 0, -1, dtype=float)
    ranked = ComponentScores(
        method="order", metric="none", sign="no meaning beyond the order", components=named, roles=("all",),
        per_fact=order[None, :, None],
    )  # fmt: skip
    return select_exactly(ranked, model, n_entries=n_entries, kinds=("mlp", "attention"))


def with_false_labels(split: FactSplit, seed: int) -> FactSplit:
    """The split with wrong answers to everything an attacker trains or chooses on; the hidden facts stay true.

    So the paper's relearning attack on CounterFact was run: shown facts with the injected answer, retained ones with a
    wrong one (section 5.2 of reference/mechanistic-unlearning.md). It cannot measure what comes back.
    """
    parts = {}
    for part in ("forget_shown", "attack_dev", "retain_train"):
        facts = with_edit_targets(getattr(split, part), seed=seed)
        parts[part] = tuple(replace(fact, target_true=fact.target_new, target_new=None) for fact in facts)
    return replace(split, **parts)


def measure(
    model: Model, deal: Deal, *, baseline: Baseline, seed: int, capability: Mapping[str, int] | None = None
) -> Evaluation:
    """All of the study's evaluations: of forgotten, kept, neighboring and unrelated facts in every form, and text.

    Where all forgotten facts have the same wrong answer, kept facts are also asked for it: do they flip, too?
    """
    split, targets = deal.split, {fact.target_new for fact in deal.split.forget}
    if len(targets) == 1:
        (target,) = targets
        kept = tuple(
            fact if fact.target_true == target else replace(fact, target_new=target) for fact in split.retain_test
        )
        split = replace(split, retain_test=kept)
    found = evaluate(model, split, original=baseline, max_facts=N_EVALUATED, seed=seed)
    rows = [found.rows]
    if deal.elsewhere:
        beside = evaluate(
            model, replace(split, retain_test=deal.elsewhere), parts=("retain_test",), kinds=("prompt", "question"),
            max_forms=1, max_facts=None, seed=seed,
        )  # fmt: skip
        rows.append(beside.rows.assign(part="elsewhere"))
    rows += [capability_rows(model, task, max_questions=n) for task, n in (capability or {}).items()]
    return replace(found, rows=pd.concat(rows, ignore_index=True))


def tuning_score(model: Model, split: FactSplit) -> dict[str, float]:
    """What the tuner looks at: facts that no result is scored on, asked as they were trained.

    score = P(wrong answer) - P(true answer) on the shown and dev facts to forget + P(true answer) on watched retained
    facts, each among candidates; between -1 and 2. Damage needs no term: every edit ends within the same budget.
    """
    scores = mean_of(model, (*split.forget_shown, *split.attack_dev))
    kept = mean_of(model, set_aside(split.retain_train, split.forget)[0])
    parts = {"forget": scores["p_true"], "edit": scores["p_new"], "maintain": kept["p_true"]}
    return parts | {"score": parts["edit"] - parts["forget"] + parts["maintain"]}


def mean_of(model: Model, facts: Sequence[Fact], **options: Any) -> dict[str, float]:
    """Means over facts of p_true and p_new, see `score_facts`."""
    scores = score_facts(model, facts, **options)
    return {name: float(scores[name].to_numpy().mean()) for name in ("p_true", "p_new")}
