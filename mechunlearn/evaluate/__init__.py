"""Measuring a model: model + split -> Evaluation, one file a family of metrics."""

from collections.abc import Sequence
from typing import Annotated

import pandas as pd
from pydantic import Field

from mechunlearn.evaluate.disruption import Baseline, disruption_rows, take_baseline
from mechunlearn.evaluate.drift import drift
from mechunlearn.evaluate.knowledge import FormKind, edit_success_rows, knowledge_rows, neighborhood_rows
from mechunlearn.evaluate.results import Evaluation
from mechunlearn.facts import FactSplit
from mechunlearn.models import Model

__all__ = ["PARTS", "Baseline", "Evaluation", "drift", "evaluate", "take_baseline"]

PARTS = ("forget_shown", "forget_hidden", "attack_dev", "retain_test", "same_subject")


def evaluate(
    model: Model,
    split: FactSplit,
    *,
    original: Model | Baseline | None = None,
    parts: Sequence[str] = PARTS,
    kinds: Sequence[FormKind] = ("prompt", "paraphrase", "question", "choice"),
    max_forms: Annotated[int, Field(ge=1)] = 2,
    max_facts: Annotated[int | None, Field(ge=1)] = 128,
    drop_targets: bool = False,
    batch_size: Annotated[int, Field(ge=1)] = 256,
    seed: int = 0,
) -> Evaluation:
    """Score every part of the split in every kind of form, and how far the model is from the original.

    Args:
        original: what to compare with; a `Baseline` when the original is the same object before its edit. None
            leaves perplexity ratio and KL out.
        parts: which parts of the split; empty ones are skipped.
        kinds: which forms; a fact without a form has no row for it.
        max_forms: paraphrases and questions a fact.
        max_facts: facts a part, the first ones (parts are shuffled when split); None means all.
        drop_targets: leave `target_new` out of the candidates.
        seed: draws the options of multiple choice.

    Raises:
        ValueError: an unknown part, or nothing to measure.
    """
    options = {
        "parts": list(parts), "kinds": list(kinds), "max_forms": max_forms, "max_facts": max_facts,
        "drop_targets": drop_targets, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    if unknown := [part for part in parts if part not in (*PARTS, "retain_train")]:
        raise ValueError(f"evaluate: got part {unknown[0]!r}, allowed: {', '.join((*PARTS, 'retain_train'))}")
    frames: list[pd.DataFrame] = []
    for part in parts:
        facts = getattr(split, part)[:max_facts]
        if not facts:
            continue
        frames.append(
            knowledge_rows(
                model, facts, part,
                kinds=kinds, max_forms=max_forms, drop_targets=drop_targets, batch_size=batch_size, seed=seed,
            )
        )  # fmt: skip
        if part in ("forget_shown", "forget_hidden", "attack_dev"):
            frames.append(edit_success_rows(model, facts, part, batch_size=batch_size))
            frames.append(neighborhood_rows(model, facts, part, batch_size=batch_size))
    if original is not None:
        baseline = original if isinstance(original, Baseline) else take_baseline(original, split)
        frames.append(disruption_rows(model, baseline))
    frames = [frame for frame in frames if not frame.empty]
    if not frames:
        raise ValueError(f"evaluate: the parts {', '.join(parts)} hold no facts; give a split with facts")
    rows = pd.concat(frames, ignore_index=True)
    return Evaluation(rows=rows, options=options, model=model.name, facts_sha256=split.sha256)
