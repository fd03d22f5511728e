"""How much an edit disturbed everything else: perplexity, and KL from the original on text and retained prompts.

The text states retained facts that no editor sees. Neutral text would not do: editors train on more of its kind, and
come out better at it than the original.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mechunlearn.evaluate.results import COLUMNS
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.metrics import Reference, kl_from, perplexity, reference_of
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import forms, render


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """What the original predicts on text and on retained prompts; taken before the edit is applied."""

    texts: tuple[str, ...]
    perplexity: float
    text: Reference
    retained: Reference | None


def take_baseline(
    original: Model, split: FactSplit, *, texts: Sequence[str] | None = None, max_facts: int = 64
) -> Baseline:
    """Record the original; an edit applied to the same model object would change what it says.

    Args:
        texts: your own; by default the retained test facts as statements, or neutral text where there are none.
    """
    kept = split.retain_test[:max_facts]
    prompts = [render(fact, "prompt") for fact in kept]
    if texts is None:
        texts = [_statement(fact, turn) for turn, fact in enumerate(kept)] or neutral_text(32, seed=77_010)
    return Baseline(
        texts=tuple(texts),
        perplexity=perplexity(original, texts),
        text=reference_of(original, texts),
        retained=reference_of(original, prompts) if prompts else None,
    )


def _statement(fact: Fact, turn: int) -> str:
    """The fact in its prompt or one of the paraphrases, in turns."""
    declarative = forms(fact)[: 1 + len(fact.paraphrases)]
    return f"{render(fact, declarative[turn % len(declarative)])} {fact.target_true}."


def disruption_rows(model: Model, baseline: Baseline) -> pd.DataFrame:
    """Perplexity on the text, its ratio to the original's, and mean KL(original || model) a token."""
    now = perplexity(model, baseline.texts)
    values = [
        ("text", "perplexity", now),
        ("text", "perplexity_ratio", now / baseline.perplexity),
        ("text", "kl", kl_from(model, baseline.text)),
    ]
    if baseline.retained is not None:
        values.append(("retain_test", "kl", kl_from(model, baseline.retained)))
    rows = [(part, "", "", "", "text", metric, value) for part, metric, value in values]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))
