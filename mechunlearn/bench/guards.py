"""The bench of guards: every experiment under several deals; what is done is kept and never done again."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.bench.guard_experiments import EXPERIMENTS
from mechunlearn.bench.guard_ground import Ground
from mechunlearn.checkpoints import load_model
from mechunlearn.experiment import process_pool
from mechunlearn.facts import Fact, FactSet, split_facts
from mechunlearn.features.bundled import dictionary_of
from mechunlearn.files import whole_file
from mechunlearn.metrics import known_facts
from mechunlearn.statistics import seed_interval

# pandas has no complete types
# pyright: standard


@dataclass(frozen=True, kw_only=True)
class GuardBench:
    """What is measured; hashable, so that worker processes deal each seed once."""

    model: str
    facts: FactSet
    forget: tuple[Fact, ...]
    far: tuple[Fact, ...]
    dictionary: str
    topic: str | None = None
    max_facts: int = 96
    device: str = "cpu"

    def digest(self) -> str:
        """Equal for what would be measured alike."""
        model = load_model(self.model, device=self.device)
        said = json.dumps(asdict(self) | {"sha256": model.sha256}, sort_keys=True)
        digest = hashlib.sha256(said.encode())
        for name, weights in sorted(dictionary_of(model, self.dictionary).weights.items()):
            digest.update(name.encode() + weights.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]


@cache
def ground_of(bench: GuardBench, seed: int) -> Ground:
    """The deal of a seed, of the facts that the model knows."""
    model = load_model(bench.model, device=bench.device)
    known = {fact.key for fact in known_facts(model, (*bench.facts, *bench.far))}
    forget = [fact for fact in bench.forget if fact.key in known]
    split = split_facts(bench.facts.where(lambda fact: fact.key in known), forget, seed=seed)
    return Ground(
        model=model, split=split, dictionary=bench.dictionary,
        far=tuple(fact for fact in bench.far if fact.key in known), topic=bench.topic, seed=seed,
        max_facts=bench.max_facts,
    )  # fmt: skip


def measure(bench: GuardBench, experiment: str, seed: int, path: Path) -> Path:
    """Carry out one experiment under one seed, unless its file is there."""
    if not path.is_file():
        rows: list[dict[str, Any]] = []
        for arm, x, values in EXPERIMENTS[experiment](ground_of(bench, seed)):
            about = {"experiment": experiment, "arm": arm, "x": x, "seed": seed}
            rows += [about | {"measure": measure, "value": value} for measure, value in values.items()]
        columns = pd.Index(["experiment", "arm", "x", "seed", "measure", "value"])
        with whole_file(path) as partial:
            pd.DataFrame(rows, columns=columns).to_csv(partial, index=False)
    return path


def bench_guards(
    bench: GuardBench, experiments: Sequence[str], seeds: int, out: Path, *, workers: int = 1,
    on_progress: Callable[[str, float, float], None] = lambda text, done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """Every experiment under every seed: experiment, arm, x, seed, measure, value; goes on where it stopped."""
    ground_of(bench, 0).guard("static")  # what does not fit is told before anything is begun
    parts = out / bench.digest()
    parts.mkdir(parents=True, exist_ok=True)
    todo = [(name, seed, parts / f"{name}-{seed}.csv") for seed, name in product(range(seeds), experiments)]
    found: list[pd.DataFrame] = []
    with process_pool(workers) as pool:
        run = map if pool is None else pool.map
        for path in run(measure, [bench] * len(todo), *zip(*todo, strict=True)):
            found.append(pd.read_csv(path))
            on_progress(path.stem, len(found), len(todo))
    return pd.concat(found, ignore_index=True)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95% intervals (Student's t): experiment, arm, x, measure, value, lower, upper, n_seeds."""
    keys = ["experiment", "arm", "x", "measure"]
    lines: list[Mapping[str, Any]] = []
    groups: Any = rows.groupby(keys, sort=False)
    for key, group in groups:
        found = seed_interval(group["value"].to_numpy())
        lines.append(
            dict(zip(keys, key, strict=True))
            | {"value": found.value, "lower": found.lower, "upper": found.upper, "n_seeds": found.n}
        )
    return pd.DataFrame(lines)
