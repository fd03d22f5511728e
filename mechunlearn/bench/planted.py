"""How often each localizer is right, on models in which the place of the facts is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.bench.planted_scores import Planted, score_plant, verify_plant
from mechunlearn.bench.planted_settings import PlantedSettings
from mechunlearn.bench.ranks import (
    CELLS,
    METRICS,
    PRIOR,
    RANDOM,
    cell_metrics,
    depth_prior,
    differences,
    random_metrics,
    ranking_metrics,
    summarize,
    values_of_kind,
)
from mechunlearn.components import ComponentScores, Reduction
from mechunlearn.experiment import process_pool

# pandas has no complete types
# pyright: standard

BASELINES = (RANDOM, PRIOR, "gradient_norm")
"""What every localizer is compared with; the last one if it is among the localizers."""
DEVELOPMENT, KEPT_OUT = "development", "kept out"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedBench:
    """What `bench planted` found."""

    ladder: pd.DataFrame
    """One row a plant, those left out too: base, part, accuracies, cost by role, roles, reason."""
    rows: pd.DataFrame
    """One row a (plant, localizer): rank metrics, those of `CELLS`, and `error`, why a localizer could not score it."""

    @property
    def summary(self) -> pd.DataFrame:
        """Metrics by localizer, part of the ladder and kind of plant, with intervals over bases."""
        return summarize(self.rows)

    @property
    def differences(self) -> pd.DataFrame:
        """Paired differences to the baselines, with intervals over bases."""
        return differences(self.rows, BASELINES)


def bench_planted(
    settings: PlantedSettings,
    plants: Sequence[Path],
    *,
    on_progress: Callable[[str, float, float], None] = lambda text, done, total: None,
) -> PlantedBench:
    """Verify the plants, score the good ones by every localizer of the settings, rank and compare.

    Records and scores are kept beside the plants and reused, so an interrupted bench goes on where it stopped.

    Args:
        plants: the files that `organisms.planted.make_plant` wrote.

    Raises:
        ValueError: no plant passed its verification, or none of the development part did.
    """
    lines = settings.lines()
    with process_pool(settings.workers) as pool:
        run = map if pool is None else pool.map
        checked: list[Planted] = []
        for planted in run(verify_plant, plants):
            checked.append(planted)
            on_progress(f"verified {planted.base} {planted.part}", len(checked), 2 * len(plants))
        good = [planted for planted in checked if not planted.verification.reason]
        rows: list[dict[str, Any]] = []
        for i, scores in enumerate(run(score_plant, good, [lines] * len(good)), start=1):
            on_progress(f"scored {good[i - 1].base} {good[i - 1].part}", len(plants) + i, len(plants) + len(good))
            rows += _rows(good[i - 1], scores, settings)
    return PlantedBench(ladder=_ladder(checked, settings), rows=pd.DataFrame(rows + baselines(good, settings)))


def part_of(planted: Planted, settings: PlantedSettings) -> str:
    """Whether a model may be looked at while localizers are made, or is kept out."""
    held = planted.architecture in settings.held_out_architectures or planted.seed in settings.held_out_seeds
    return KEPT_OUT if held else DEVELOPMENT


def baselines(good: Sequence[Planted], settings: PlantedSettings) -> list[dict[str, Any]]:
    """Rows of a random ranking (in expectation) and of the depth prior, learnt on the development part alone."""
    development = [planted for planted in good if part_of(planted, settings) == DEVELOPMENT]
    if not development:
        raise ValueError(
            f"bench planted: {len(good)} plants passed their verification, none of the development part; train longer "
            "(ladder.plant_steps), or see the reasons in the ladder's records"
        )
    prior = depth_prior([planted.components for planted in development], good[0].n_layers)
    rows = []
    for planted in good:
        of_kind = {part: value for part, value in prior.items() if part.kind == planted.components[0].kind}
        about = _about(planted, settings)
        rows.append(about | {"localizer": RANDOM, "error": ""} | random_metrics(planted.n_layers, planted.components))
        if of_kind:
            rows.append(about | {"localizer": PRIOR, "error": ""} | ranking_metrics(of_kind, planted.components))
    return rows


def _rows(
    planted: Planted, scores: Sequence[tuple[str, ComponentScores | str]], settings: PlantedSettings
) -> list[dict[str, Any]]:
    """One row a localizer; empty metrics where it does not score components of the planted kind."""
    reductions: dict[str, Reduction] = {line.name: line.reduce for line in settings.lines()}
    rows = []
    nothing = dict.fromkeys((*METRICS, *CELLS), float("nan"))
    for name, given in scores:
        about = _about(planted, settings) | {"localizer": name}
        if isinstance(given, str):
            rows.append(about | nothing | {"error": given})
            continue
        values = values_of_kind(given, planted.components[0].kind, reductions[name])
        found = nothing
        if values:
            cells = cell_metrics(given, planted.components, planted.verification.roles, reductions[name])
            found = ranking_metrics(values, planted.components) | cells
        rows.append(about | found | {"error": ""})
    return rows


def _about(planted: Planted, settings: PlantedSettings) -> dict[str, Any]:
    return {
        "part": part_of(planted, settings), "base": planted.base, "architecture": planted.architecture,
        "seed": planted.seed, "plant": planted.part, "group": planted.group, "layer": planted.components[0].layer,
    }  # fmt: skip


def _ladder(checked: Sequence[Planted], settings: PlantedSettings) -> pd.DataFrame:
    rows = []
    for planted in checked:
        found = planted.verification
        cost = {f"cost at {role}": value for role, value in found.cost.items()}
        rows.append(
            _about(planted, settings)
            | {"new": found.new, "old": found.old, "restored": found.restored}
            | cost | {"roles": " ".join(found.roles), "reason": found.reason}
        )  # fmt: skip
    return pd.DataFrame(rows)
