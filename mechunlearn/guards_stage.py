"""The benches of guards and of code deletion as the command line offers them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechunlearn.bench.code_experiments import CODE_EXPERIMENTS, NEVER_KNEW, NEVER_KNEW_WITHOUT, WITHOUT
from mechunlearn.bench.guard_experiments import names_of, zero_shot
from mechunlearn.bench.guards import GuardBench, summary
from mechunlearn.bench.guards import bench_guards as measure_guards
from mechunlearn.checkpoints import choose_device
from mechunlearn.experiment import choose_facts, n_workers
from mechunlearn.files import replaceable, whole_folder
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.shipped_features import CODEBOOKS
from mechunlearn.report.guards import codes_figure, guards_figure
from mechunlearn.settings import FactsSettings
from mechunlearn.sources.bundled import BUNDLED, load_bundled

Progress = Callable[[str, float, float], None]
TOPICS = {"sport-hockey": "plays hockey"}
NEEDS_TOPIC = zero_shot.__name__


def bench_guards(
    name: str, facts: Mapping[str, str], experiments: Sequence[str], out: Path, *, dictionary: str,
    hook_point: str | None, topic: str | None, max_facts: int, seeds: int, workers: int, device: str,
    on_progress: Progress,
) -> pd.DataFrame:  # fmt: skip
    """Measure guards on a model; writes tables/rows.csv (a row a seed), summary.csv and figure.html into `out`.

    Facts far from those to forget are those of other relations; of a bundled organism all that it read. Without a
    topic the experiment that needs one is left out.

    Raises:
        ValueError: an unknown experiment, `zero_shot` without a topic, or a dictionary that does not fit.
    """
    wanted = names_of(experiments)
    if topic is None:
        if NEEDS_TOPIC in experiments:
            raise ValueError(f"{NEEDS_TOPIC}: got no topic; say in words what is to be forgotten (--topic)")
        wanted = tuple(experiment for experiment in wanted if experiment != NEEDS_TOPIC)
    bench = _bench(name, facts, max_facts, device, dictionary=dictionary, hook_point=hook_point, topic=topic)
    return _measured(bench, wanted, out, seeds, workers, guards_figure, on_progress)


def topic_of(facts: Mapping[str, str]) -> str | None:
    """What a default forget set is about, in words; None of facts that share no answer, and of other facts."""
    return TOPICS.get(facts.get("forget", ""))


def bench_codes(
    name: str, facts: Mapping[str, str], experiments: Sequence[str], out: Path, *, without: str, never_knew: str,
    never_knew_without: str, bert_model: str | None, max_facts: int, seeds: int, workers: int, device: str,
    on_progress: Progress,
) -> pd.DataFrame:  # fmt: skip
    """Measure code deletion on a codebook model; writes as `bench_guards` does.

    Args:
        without: the model that it was made of.
        never_knew: the codebook model of that one's twin.
        never_knew_without: that twin.
        bert_model: folder or hub name of BERTScore's encoder; None leaves that score out.

    Raises:
        ValueError: an unknown experiment, or a model without a codebook.
    """
    wanted = names_of(experiments, CODE_EXPERIMENTS)
    beside = ((WITHOUT, without), (NEVER_KNEW, never_knew), (NEVER_KNEW_WITHOUT, never_knew_without))
    bench = _bench(name, facts, max_facts, device, beside=beside, bert_model=bert_model)
    return _measured(bench, wanted, out, seeds, workers, codes_figure, on_progress)


def _bench(name: str, facts: Mapping[str, str], max_facts: int, device: str, **more: Any) -> GuardBench:
    known, forget = choose_facts(FactsSettings.model_validate(facts))
    relations = {fact.relation for fact in forget}
    own = name in ORGANISMS or name in CODEBOOKS
    others = [fact for dataset in BUNDLED for fact in load_bundled(dataset)] if own else known
    return GuardBench(
        model=name, facts=known, forget=forget, far=tuple(fact for fact in others if fact.relation not in relations),
        max_facts=max_facts, device=str(choose_device(device)), **more,
    )  # fmt: skip


def _measured(
    bench: GuardBench, wanted: Sequence[str], out: Path, seeds: int, workers: int,
    figure: Callable[[pd.DataFrame], go.Figure], on_progress: Progress,
) -> pd.DataFrame:  # fmt: skip
    replaceable(out / "tables")
    rows = measure_guards(
        bench, wanted, seeds, out, workers=n_workers(workers, [bench.device]), on_progress=on_progress
    )
    found = summary(rows)
    with whole_folder(out / "tables") as partial:
        rows.to_csv(partial / "rows.csv", index=False)
        found.to_csv(partial / "summary.csv", index=False)
        figure(found).write_html(partial / "figure.html")
    return found
