"""The verdict measured on models whose truth is known: how often it is right, and what decided it.

Its word on a model is taken as a user would take it, with one exception: a suppressed model is judged with the power
that the attacks have shown on the *other* kinds of suppression, so that it does not vouch for itself.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mechunlearn.cells import CellTask, Side, loaded
from mechunlearn.evidence import AttackEvidence, PositiveControl, evidence_by_attack
from mechunlearn.experiment import Stage, prepare, task_key, workers
from mechunlearn.judging import Judging
from mechunlearn.runs import Cell, CellRole
from mechunlearn.settings import Settings
from mechunlearn.statistics import exact_interval
from mechunlearn.verdict import Verdict, decide

# pandas has no complete types
# pyright: standard

Truth = Literal["knows", "never knew"]
FACT_SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of the hidden facts, that verdicts are made with."""
EXPECTED: Mapping[Truth, str] = {"knows": "hidden", "never knew": "removed"}
SHARES = (0.25, 0.5, 0.75)
"""Of the facts that the partly knowing models know."""
QUICK = ("original", "suppressed-lora", "taught-50", "second-twin", "made-up-facts")
"""The cases of a quick bench."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model state and what is known of it."""

    name: str
    truth: Truth
    side: Side
    null: Side
    role: CellRole = "arm"


def cases(settings: Settings) -> list[Case]:
    """Every model of known truth, with and without an edit that cannot change it.

    Models that know: the original; it with wrong answers trained into its last MLPs (the stream below them, where the
    facts are looked up, is untouched bit for bit); each kind of suppression; a never-knew twin that was taught a share
    of the facts, or all of them in one form of asking. Models that never knew: the second twin, unedited, edited at the
    lookup or late, or suppressed; and the original, asked for facts that were made up.

    Raises:
        ValueError: no twin, no second twin, or no arm to take editor, options and the lookup's components from.
    """
    if not (settings.twin and settings.second_twin and settings.suppress and len(settings.arms) == 2):
        raise ValueError(
            "bench verdict: the settings need a twin, a second twin, kinds of suppression and two arms "
            "(an edit at the lookup, one late)"
        )
    seed = settings.seed
    original, twin, second = (
        Side(model=name, seed=seed) for name in (settings.model, settings.twin, settings.second_twin)
    )
    found = [Case(name="original", truth="knows", side=original, null=twin, role="original")]
    for kind in settings.suppress:
        sides = (replace(side, suppression=kind) for side in (original, twin))
        found.append(
            Case(name=f"suppressed-{kind}", truth="knows", side=next(sides), null=next(sides), role="suppressed")
        )
    for share in SHARES:
        taught = replace(second, taught=True, options={"share": share})
        found.append(Case(name=f"taught-{share:.0%}".replace("%", ""), truth="knows", side=taught, null=twin))
    one_form = replace(second, taught=True, options={"one_form": True})
    found.append(Case(name="taught-one-form", truth="knows", side=one_form, null=twin))
    found.append(Case(name="second-twin", truth="never knew", side=second, null=twin, role="twin"))
    made_up = (replace(side, fabricated=True) for side in (original, twin))
    found.append(Case(name="made-up-facts", truth="never knew", side=next(made_up), null=next(made_up)))
    kind = next(iter(settings.suppress))
    sides = (replace(side, suppression=kind) for side in (second, twin))
    found.append(Case(name=f"second-twin-{kind}", truth="never knew", side=next(sides), null=next(sides)))
    for name, arm in zip(("lookup", "late"), settings.arms, strict=True):
        edit: dict[str, Any] = {
            "editor": arm.editor, "components": tuple(arm.components or ()), "options": arm.options,
            "drop_targets": True,
        }  # fmt: skip
        edited = Case(
            name=f"second-twin-{name}-edit",
            truth="never knew",
            side=replace(second, **edit),
            null=replace(twin, **edit),
        )
        found.append(edited)
        if name == "late":
            found.append(
                Case(name="original-late-edit", truth="knows", side=replace(original, **edit), null=edited.null)
            )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class VerdictBench:
    """What `bench verdict` found."""

    verdicts: pd.DataFrame
    """One row a (seed, case, share of the hidden facts): truth, word, whether right, what decided, seconds.

    Seeds have slightly different numbers of hidden facts, for what the original does not know is left out."""
    power: pd.DataFrame
    """One row a (seed, kind of suppression, attack): D with bounds, whether it recovers the kind, and acceptance."""

    def confusion(self, share: float = 1.0) -> pd.DataFrame:
        """Of each truth, how often each word was said; with all hidden facts unless told."""
        rows = self.at(share)
        return pd.crosstab(rows["truth"], rows["word"])

    def at(self, share: float = 1.0) -> pd.DataFrame:
        """The verdicts made with this share of the hidden facts."""
        return self.verdicts.loc[self.verdicts["share_of_facts"] == share]

    def goals(self, share: float = 1.0) -> pd.DataFrame:
        """The goals with what was measured: number, of how many, exact 95% interval, and whether the goal is met.

        Intervals take verdicts as independent, but seeds redraw facts and attacks of the same three models: true ones
        are wider. A goal of which nothing was measured is not met.
        """
        rows = self.at(share)
        words, right = list(rows["word"]), list(rows["right"])
        decided = [ok for word, ok in zip(words, right, strict=True) if word in EXPECTED.values()]
        recovered: dict[tuple[int, str], bool] = {}
        accepted: dict[tuple[int, str], bool] = {}
        for row in self.power.to_dict("records"):
            key = row["seed"], row["kind"]
            accepted[key] = row["accepted"]
            recovered[key] = recovered.get(key, False) or row["recovers"]
        suppressed = [recovered[key] for key, ok in accepted.items() if ok]
        kinds = {kind: any(accepted[key] and recovered[key] for key in accepted if key[1] == kind)
                 for _, kind in accepted}  # fmt: skip
        undecided = len(words) - len(decided)
        never = [word for word, truth in zip(words, rows["truth"], strict=True) if truth == "never knew"]
        blank = sum(word not in EXPECTED.values() for word in never)
        counted: list[tuple[str, int, int, str, float]] = [
            ("decided verdicts right", sum(decided), len(decided), ">=", 0.95),
            ("confidently wrong", len(decided) - sum(decided), len(decided), "<=", 0.0),
            ("inconclusive", words.count("inconclusive"), len(words), "<=", 0.20),
            ("invalid", words.count("invalid"), len(words), "<=", 0.20),
            ("inconclusive or invalid", undecided, len(words), "<=", 0.20),
            ("the same, of those that never knew", blank, len(never), "<=", 0.20),
            ("suppressed models accepted", sum(accepted.values()), len(accepted), ">=", 0.80),
            ("accepted suppressions recovered", sum(suppressed), len(suppressed), ">=", 1.0),
            ("kinds accepted and recovered", sum(kinds.values()), len(kinds), ">=", 1.0),
        ]  # fmt: skip
        table: list[tuple[Any, ...]] = []
        for name, count, n, sense, goal in counted:
            interval = exact_interval(count, n) if n else None
            found = (interval.value, interval.lower, interval.upper) if interval else (float("nan"),) * 3
            met = bool(n) and (found[0] >= goal if sense == ">=" else found[0] <= goal)
            table.append((name, count, n, *found, f"{sense} {goal:.0%}", met))
        columns = ["what", "count", "of", "share", "lower", "upper", "goal", "met"]
        return pd.DataFrame(table, columns=pd.Index(columns))


def bench_verdict(
    settings: Settings, folder: Path, *, seeds: int = 5, only: Sequence[str] = (), fresh: bool = False,
    on_progress: Callable[[str, float, float], None] = lambda text, done, total: None,
) -> VerdictBench:  # fmt: skip
    """Judge every case under every seed; seeds vary the deal of the facts, treatments and attacks.

    Cells are kept under `folder` and reused, so an interrupted bench goes on where it stopped.

    Args:
        only: names of the cases to judge; none means all.

    Raises:
        ValueError: settings without the models or arms it needs, see `cases`.
    """

    def wanted(one: Settings) -> list[Case]:
        return [case for case in cases(one) if not only or case.name in only]

    per_seed = [settings.model_copy(update={"seed": settings.seed + i}) for i in range(seeds)]
    total = seeds * (len(wanted(settings)) + 1)
    verdicts: list[dict[str, Any]] = []
    power: list[dict[str, Any]] = []
    with workers(settings) as pool:
        started: list[tuple[Stage, Judging]] = []
        for i, one in enumerate(per_seed):
            on_progress(f"preparing seed {one.seed}", i, total)
            stage = prepare(one, load=loaded)
            judging = Judging(
                splits=stage.splits, settings=one, folder=folder / f"seed-{one.seed}", pool=pool, fresh=fresh
            )
            judging.start([_task(stage, case) for case in wanted(one)])
            started.append((stage, judging))
        for i, (stage, judging) in enumerate(started):
            done = seeds + i * len(wanted(settings))
            cells = judging.finish(lambda text, k, done=done, one=stage.settings: on_progress(
                f"seed {one.seed}, {text}", done + k, total))  # fmt: skip
            controls, rows = _controls(cells, stage.settings)
            power += rows
            for case in wanted(stage.settings):
                cell = next(cell for cell in cells if cell.name == case.name)
                verdicts += _verdicts(case, cell, controls, stage.settings)
    return VerdictBench(verdicts=pd.DataFrame(verdicts), power=pd.DataFrame(power))


def _task(stage: Stage, case: Case) -> CellTask:
    task = CellTask(
        name=case.name, role=case.role, sides=(replace(case.side, against=stage.settings.model),), nulls=(case.null,),
        original=stage.settings.model, null=stage.settings.twin,
    )  # fmt: skip
    return replace(task, key=task_key(stage, task))


def _controls(cells: Sequence[Cell], settings: Settings) -> tuple[tuple[PositiveControl, ...], list[dict[str, Any]]]:
    """What each suppressed model showed, and its attacks row by row."""
    controls: list[PositiveControl] = []
    rows: list[dict[str, Any]] = []
    for cell in [cell for cell in cells if cell.role == "suppressed"]:
        control, acceptance = PositiveControl.from_dict(cell.notes["control"]), cell.notes["acceptance"]
        controls.append(control)
        for row in cell.verdict.rows:
            recovers = row.healthy and row.lower > settings.verdict.delta
            rows.append(
                {"seed": settings.seed, "kind": control.kind, "attack": row.name, "D": row.share, "lower": row.lower,
                 "upper": row.upper, "healthy": row.healthy, "recovers": recovers, "accepted": control.accepted}
                | {key: acceptance[key] for key in ("direct_accuracy", "chance", "retained_before", "retained_after",
                                                    "probe_before", "probe_after", "reason")}
            )  # fmt: skip
    return tuple(controls), rows


def _verdicts(case: Case, cell: Cell, controls: Sequence[PositiveControl], settings: Settings) -> list[dict[str, Any]]:
    """The cell's verdict from all its hidden facts, and from fewer of them (no other attack: fewer to score)."""
    others = [control for control in controls if control.kind != case.side.suppression or case.role != "suppressed"]
    whole = evidence_by_attack(cell.edited, cell.null)
    facts = sorted(set(whole[0].facts))
    random.Random(f"{settings.seed} facts").shuffle(facts)
    rows = []
    for share in FACT_SHARES:
        kept = set(facts[: int(share * len(facts))])
        verdict = decide([_among(entry, kept) for entry in whole], controls=others, **_bounds(cell, settings))
        rows.append(
            {"seed": settings.seed, "case": case.name, "truth": case.truth, "share_of_facts": share,
             "n_facts": len(kept), "word": verdict.label, "still_expressed": verdict.still_expressed,
             "right": verdict.label == EXPECTED[case.truth]}
            | _decided(verdict) | {"seconds": cell.notes["seconds"], "reason": verdict.reason}
        )  # fmt: skip
    return rows


def _decided(verdict: Verdict) -> dict[str, Any]:
    """The attack that settled the word, or came closest to."""
    able = [row for row in verdict.rows if row.counts]
    if not able:
        return {"attack": "", "D": float("nan"), "lower": float("nan"), "upper": float("nan")}
    row = max(able, key=lambda row: row.lower if verdict.label == "hidden" else row.upper)
    return {"attack": row.name, "D": row.share, "lower": row.lower, "upper": row.upper}


def _among(entry: AttackEvidence, facts: set[str]) -> AttackEvidence:
    """The evidence of some of the facts."""
    at = [i for i, fact in enumerate(entry.facts) if fact in facts]
    parts = {name: tuple(getattr(entry, name)[i] for i in at) for name in ("facts", "seeds", "edited", "null")}
    return replace(entry, **parts)


def _bounds(cell: Cell, settings: Settings) -> dict[str, Any]:
    return {
        "original": cell.notes["A_o"], "null_before": cell.notes["A_n"], "delta": settings.verdict.delta,
        "draws": settings.verdict.draws, "seed": settings.seed,
    }  # fmt: skip
