"""How much an edit disturbed everything else: perplexity, and KL from the original on text and retained prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mechunlearn.evaluate.results import COLUMNS
from mechunlearn.facts import FactSplit
from mechunlearn.metrics import Reference, kl_from, perplexity, reference_of
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import render

TEXT_SEED = 77_010  # passages that no editor (seeds from 0) and no attack trains on


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """What the original predicts on neutral text and on retained prompts; taken before the edit is applied."""

    texts: tuple[str, ...]
    perplexity: float
    text: Reference
    retained: Reference | None


def take_baseline(
    original: Model, split: FactSplit, *, texts: Sequence[str] | None = None, max_facts: int = 64
) -> Baseline:
    """Record the original; an edit applied to the same model object would change what it says."""
    texts = tuple(neutral_text(32, seed=TEXT_SEED) if texts is None else texts)
    prompts = [render(fact, "prompt") for fact in split.retain_test[:max_facts]]
    return Baseline(
        texts=texts,
        perplexity=perplexity(original, texts),
        text=reference_of(original, texts),
        retained=reference_of(original, prompts) if prompts else None,
    )


def disruption_rows(model: Model, baseline: Baseline) -> pd.DataFrame:
    """Perplexity on neutral text, its ratio to the original's, and mean KL(original || model) a token."""
    now = perplexity(model, baseline.texts)
    values = [
        ("neutral_text", "perplexity", now),
        ("neutral_text", "perplexity_ratio", now / baseline.perplexity),
        ("neutral_text", "kl", kl_from(model, baseline.text)),
    ]
    if baseline.retained is not None:
        values.append(("retain_test", "kl", kl_from(model, baseline.retained)))
    rows = [(part, "", "", "", "text", metric, value) for part, metric, value in values]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))
