"""The benches of guards and of code deletion: every experiment under several deals, none of them done twice."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechunlearn.bench.code_experiments import CODE_EXPERIMENTS, WITHOUT
from mechunlearn.bench.guard_experiments import EXPERIMENTS
from mechunlearn.bench.guard_ground import Ground
from mechunlearn.checkpoints import load_model
from mechunlearn.codebook_model import codebook_of
from mechunlearn.experiment import process_pool
from mechunlearn.facts import Fact, FactSet, split_facts
from mechunlearn.features.bundled import dictionary_of
from mechunlearn.features.quality import check_fits
from mechunlearn.files import whole_file
from mechunlearn.metrics import known_facts
from mechunlearn.models import Model
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
    dictionary: str | None = None
    hook_point: str | None = None
    topic: str | None = None
    beside: tuple[tuple[str, str], ...] = ()
    """Other models on the same facts: (what it is, its name)."""
    bert_model: str | None = None
    max_facts: int = 96
    device: str = "cpu"

    def digest(self) -> str:
        """Equal for what would be measured alike."""
        model, _, beside = known_of(self)
        models = [model.sha256, *(one.sha256 for one in beside.values())]
        digest = hashlib.sha256(json.dumps(asdict(self) | {"sha256": models}, sort_keys=True).encode())
        weights = dictionary_of(model, self.dictionary, self.hook_point).weights if self.dictionary else {}
        for name, value in sorted(weights.items()):
            digest.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]


@cache
def known_of(bench: GuardBench) -> tuple[Model, frozenset[tuple[str, str, str]], dict[str, Model]]:
    """The model, the keys of the facts that it knew, and the models beside it; of every seed the same.

    Of a codebook model those that it knew without the codebook: else what that costs would be left out of all that
    is measured.
    """
    model = load_model(bench.model, device=bench.device)
    beside = {what: load_model(name, device=bench.device) for what, name in bench.beside}
    known = known_facts(beside.get(WITHOUT, model), (*bench.facts, *bench.far))
    return model, frozenset(fact.key for fact in known), beside


@cache
def ground_of(bench: GuardBench, seed: int) -> Ground:
    """The deal of a seed, of the facts that the model knew.

    Raises:
        ValueError: it knew none of those to forget.
    """
    model, known, beside = known_of(bench)
    if not (forget := [fact for fact in bench.forget if fact.key in known]):
        raise ValueError(f"model '{bench.model}' knows none of the {len(bench.forget)} facts to forget; give others")
    split = split_facts(bench.facts.where(lambda fact: fact.key in known), forget, seed=seed)
    return Ground(
        model=model, split=split, dictionary=bench.dictionary, hook_point=bench.hook_point,
        far=tuple(fact for fact in bench.far if fact.key in known), topic=bench.topic, seed=seed,
        max_facts=bench.max_facts, beside=beside, bert_model=bench.bert_model,
    )  # fmt: skip


def rows_of(experiment: str, ground: Ground) -> pd.DataFrame:
    """Carry out one experiment on one deal: experiment, arm, x, seed, measure, value."""
    rows = [
        (experiment, arm, x, ground.seed, name, value)
        for arm, x, values in (EXPERIMENTS | CODE_EXPERIMENTS)[experiment](ground)
        for name, value in values.items()
    ]
    return pd.DataFrame(rows, columns=pd.Index(["experiment", "arm", "x", "seed", "measure", "value"]))


def measure(bench: GuardBench, experiment: str, seed: int, path: Path) -> Path:
    """Carry out one experiment under one seed, unless its file is there."""
    if not path.is_file():
        rows = rows_of(experiment, ground_of(bench, seed))
        with whole_file(path) as partial:
            rows.to_csv(partial, index=False)
    return path


def bench_guards(
    bench: GuardBench, experiments: Sequence[str], seeds: int, out: Path, *, workers: int = 1,
    on_progress: Callable[[str, float, float], None] = lambda text, done, total: None,
) -> pd.DataFrame:  # fmt: skip
    """Every experiment under every seed: experiment, arm, x, seed, measure, value; goes on where it stopped."""
    ground = ground_of(bench, 0)  # what does not fit is told before anything is begun
    if bench.dictionary is None:
        codebook_of(ground.model)
    else:
        check_fits(ground.model, dictionary_of(ground.model, bench.dictionary, bench.hook_point))
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
