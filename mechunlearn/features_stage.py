"""Dictionaries and codebook models as the command line offers them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from mechunlearn.bench.code_experiments import CODE_EXPERIMENTS, NEVER_KNEW, NEVER_KNEW_WITHOUT, WITHOUT
from mechunlearn.bench.guard_experiments import names_of, zero_shot
from mechunlearn.bench.guards import GuardBench, summary
from mechunlearn.bench.guards import bench_guards as measure_guards
from mechunlearn.checkpoints import choose_device, load_model, save_model
from mechunlearn.codebook import Codebook
from mechunlearn.codebook_model import insert_codebook
from mechunlearn.experiment import choose_facts, n_workers
from mechunlearn.features.codebook_training import CodebookRecipe, train_codebook
from mechunlearn.features.token_rows import TokenRows, rows_of_texts
from mechunlearn.features.training import DictionaryRecipe
from mechunlearn.files import replaceable, whole_folder
from mechunlearn.models import Model
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.shipped_features import (
    CODEBOOKS,
    HOOK_POINTS,
    LENGTH,
    MEASURED,
    RECIPE,
    ROWS,
    OnStep,
    text_of,
    train_codebook_model,
    train_dictionary,
)
from mechunlearn.registry import Method
from mechunlearn.report.guards import codes_figure, guards_figure
from mechunlearn.settings import FactsSettings
from mechunlearn.sources.bundled import BUNDLED, load_bundled

Progress = Callable[[str, float, float], None]
TOPICS = {"sport-hockey": "plays hockey"}
NEEDS_TOPIC = zero_shot.__name__


def train(
    name: str,
    hook_point: str,
    options: Mapping[str, Any],
    out: Path,
    *,
    text: Path | None,
    device: str,
    on_step: Progress,
) -> tuple[pd.DataFrame, Path]:
    """Train a dictionary on a model's own text, or on a file's (a passage a line); what it became, as a table.

    Raises:
        ValueError: an unknown option or hook point, or too little text.
    """
    checked = Method(name="dictionary", kind="stage", function=DictionaryRecipe, source="").validate(options)
    recipe = replace(RECIPE, **{name: checked[name] for name in options})
    model = load_model(name, device=str(choose_device(device)))
    rows = text_of(model) if text is None else _rows_of(model, text)
    folder = out / Path(name).name / hook_point
    found = train_dictionary(
        model, hook_point, rows, recipe, folder, text=text_digest(text) if text else name,
        on_step=_told(on_step, hook_point, recipe.steps),
    )  # fmt: skip
    return pd.DataFrame([found.notes["quality"]]), folder / "dictionary"


def codebook(
    name: str, layer: int, options: Mapping[str, Any], out: Path, *, text: Path, device: str, on_step: Progress
) -> pd.DataFrame:
    """Train a codebook into a model on a file's text (a passage a line); `out` becomes a model folder that has it.

    What the training goes on from is kept beside, in `out`.training. On CPUs and cards alike it is in float32.

    Returns:
        One row: mean loss in nats per token on text that was not trained on, of the model as it was and with the
        codebook, and what that costs.

    Raises:
        ValueError: an unknown option or layer, a model that has a codebook, or too little text.
    """
    out = replaceable(out)
    if "layer" in options:
        raise ValueError(f"codebook: got --set layer={options['layer']}; give it by --layer")
    checked = Method(name="codebook", kind="stage", function=CodebookRecipe, source="")
    recipe = CodebookRecipe(**checked.validate({**options, "layer": layer}))
    model = load_model(name, device=str(choose_device(device)), dtype="float32")
    base, made = model.sha256, Codebook(recipe.shape(model.d_model), seed=recipe.seed)
    rows, unseen = _rows_of(model, text)
    before = _loss(model, unseen)
    insert_codebook(model, made, layer)

    def batches(step: int) -> dict[str, Tensor]:
        ids = rows(step)
        return {"input_ids": ids, "labels": ids}

    state = out.with_name(f"{out.name}.training")
    train_codebook(
        model.hf, batches, recipe, state, text=text_digest(text), base=base,
        on_step=_told(on_step, f"codebook in layer {layer}", recipe.steps),
    )  # fmt: skip
    after = _loss(model, unseen)
    found = {"loss without": before, "loss with": after, "cost": after - before}
    card = {"of": name, "sha256": base, "recipe": asdict(recipe), "text": text_digest(text), **found}
    with whole_folder(out) as partial:
        save_model(model, partial)
        (partial / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return pd.DataFrame([found])


def make_shipped(out: Path, *, device: str, on_step: Progress) -> list[Path]:
    """Train everything that comes with the organisms: a dictionary of each, and the codebook models."""
    made: list[Path] = []
    for name in ORGANISMS:
        for hook_point in HOOK_POINTS:
            train(name, hook_point, {}, out, text=None, device=device, on_step=on_step)
            made.append(out / name / hook_point / "dictionary")
    for name, (_, recipe) in CODEBOOKS.items():
        told = _told(on_step, name, recipe.steps)
        made.append(train_codebook_model(name, out / name, device=str(choose_device(device)), on_step=told))
    return made


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


@torch.no_grad()
def _loss(model: Model, rows: TokenRows) -> float:
    """Mean over a fixed number of batches, in nats per token."""
    batches = (rows(step).to(model.device) for step in range(MEASURED))
    return sum(float(model.hf(input_ids=ids, labels=ids, use_cache=False).loss) for ids in batches) / MEASURED


def _rows_of(model: Model, path: Path) -> tuple[TokenRows, TokenRows]:
    """Rows of nineteen of twenty passages of a file, and of the others, which are not trained on."""
    if not path.is_file():
        raise FileNotFoundError(f"--text: no file {path}; give a text file with a passage a line")
    passages = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept, unseen = [line for i, line in enumerate(passages) if i % 20], passages[::20]
    made = [rows_of_texts(model, part, rows=ROWS, length=LENGTH) for part in (kept, unseen)]
    return made[0], made[1]


def text_digest(path: Path) -> str:
    """Names a text by what it says."""
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _told(on_step: Progress, what: str, steps: int) -> OnStep:
    return lambda step, loss: on_step(f"{what}: {loss:.3f}", step, steps)
