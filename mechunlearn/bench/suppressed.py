"""Positive control: a model whose knowledge is hidden on purpose, for an attack to show its power on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy import stats

from mechunlearn.components import Component
from mechunlearn.edit.edits import WeightEdit, applied
from mechunlearn.edit.losses import (
    Forms,
    Term,
    answer_loss,
    batches,
    fact_tokens,
    near_and_far,
    text_loss,
    text_tokens,
    weighted_sum,
)
from mechunlearn.edit.training import lora_trainable, train
from mechunlearn.facts import Fact, FactSplit, with_edit_targets
from mechunlearn.masks import mask_of
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.probes import fit_probe, residual_features

MOST_PROBE_DROP = 0.05
LEAST_RETAINED = 0.95  # of the original's accuracy


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Whether a model is suppressed, and only suppressed; accuracies in [0, 1]."""

    direct_accuracy: float
    """On the hidden facts, asked directly, among their candidates."""
    chance: float
    p_value: float
    """One-sided exact binomial test of direct accuracy above chance."""
    retained_before: float
    retained_after: float
    probe_before: float
    """Of a probe halfway through the layers, trained on retained facts, read on the forgotten ones."""
    probe_after: float

    @property
    def reason(self) -> str:
        """What is missing, in words; empty when accepted."""
        missing = []
        if self.p_value < 0.05:
            missing.append(f"still answers {self.direct_accuracy:.0%} directly (chance {self.chance:.0%})")
        if self.retained_after < LEAST_RETAINED * self.retained_before:
            missing.append(f"retained facts fell from {self.retained_before:.0%} to {self.retained_after:.0%}")
        if self.probe_after < self.probe_before - MOST_PROBE_DROP:
            missing.append(f"the probe fell from {self.probe_before:.0%} to {self.probe_after:.0%}")
        return ", ".join(missing)

    @property
    def accepted(self) -> bool:
        """Only then can recovering the facts show an attack's power."""
        return not self.reason


@dataclass(frozen=True, kw_only=True, eq=False)
class Suppressed:
    """A suppressed model as an edit of the original, with what it was accepted (or not) on."""

    kind: str
    edit: WeightEdit
    acceptance: Acceptance


def suppress_with_lora(
    model: Model,
    split: FactSplit,
    *,
    rank: Annotated[int, Field(ge=1)] = 32,
    layer_share: Annotated[float, Field(gt=0, le=1)] = 1 / 3,
    steps: Annotated[int, Field(ge=0)] = 100,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    retain_weight: Annotated[float, Field(ge=0)] = 4.0,
    text_weight: Annotated[float, Field(ge=0)] = 0.5,
    forms: Forms = "all",
    max_facts: Annotated[int, Field(ge=2)] = 256,
    seed: int = 0,
) -> Suppressed:
    """Hide the forgotten facts behind a low-rank update of the last layers; everything before stays as it is.

    loss = -log P(wrong answer) on all forgotten facts + retain_weight * -log P(target_true) on `retain_train`
         + text_weight * negative log-likelihood per token of neutral text.

    Accepted if direct accuracy is not above chance (exact binomial test), retained accuracy is at least 95% of the
    original's, and a linear probe halfway through the layers reads the facts within 5 points as well as before (which
    holds by construction unless more than half of the layers are changed).

    Args:
        layer_share: share of the layers that are changed, counted from the end; at least one layer.
        forms: "all" also hides the paraphrases; with "prompt" asking otherwise would give the facts away.
        max_facts: facts (of each part) that acceptance is measured on.
        seed: of wrong answers, batches and the low-rank start.

    Returns:
        The merged weights as an ordinary `WeightEdit` (use `applied`), and the acceptance with its reason.

    Raises:
        ValueError: a fact has no wrong candidate, or a part that is needed is empty.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "split")}
    layers = range(model.n_layers - max(1, round(layer_share * model.n_layers)), model.n_layers)
    wrong = with_edit_targets(split.forget, seed=seed)
    kept = fact_tokens(model, near_and_far(split.retain_train, split.forget), forms=forms)
    taught = fact_tokens(model, wrong, answer="target_new", forms=forms)
    passages = text_tokens(model, neutral_text(64, seed=seed))
    terms = [
        Term(weight=1.0, objective=answer_loss, batches=batches(taught, batch_size, seed=seed)),
        Term(weight=retain_weight, objective=answer_loss, batches=batches(kept, batch_size, seed=seed + 1)),
        Term(
            weight=text_weight, objective=text_loss, batches=batches(passages, max(1, batch_size // 4), seed=seed + 2)
        ),
    ]
    trainable = lora_trainable(model, rank, layers=layers, seed=seed)
    history = train(model, trainable, weighted_sum(terms), steps=steps, learning_rate=learning_rate)
    mask = mask_of(model, [Component(kind, layer) for layer in layers for kind in ("attention", "mlp")])
    parameters = dict(model.hf.named_parameters())
    merged = {name: tensor.detach() for name, tensor in trainable.overrides().items()}
    edit = WeightEdit(
        values={name: merged.get(name, parameters[name].detach())[mask.full(name)].cpu() for name in mask.entries},
        mask=mask, base_name=model.name, base_sha256=model.sha256, method="suppress_with_lora", options=options,
        seed=seed, facts_sha256=split.sha256, history=history,
    )  # fmt: skip
    return Suppressed(kind="lora", edit=edit, acceptance=accept(model, split, edit, max_facts=max_facts))


def accept(model: Model, split: FactSplit, edit: WeightEdit, *, max_facts: int = 256) -> Acceptance:
    """Measure whether an edit suppresses the forgotten facts, and only them; see `suppress_with_lora`."""
    middle = model.n_layers // 2
    facts, kept = split.forget_hidden[:max_facts], split.retain_test[:max_facts] or split.retain_train[:max_facts]
    before = _state(model, facts, kept, split.retain_train[: 4 * max_facts], middle)
    with applied(model, edit):
        after = _state(model, facts, kept, split.retain_train[: 4 * max_facts], middle)
    n_correct = round(after.direct * len(facts))
    test = stats.binomtest(n_correct, len(facts), after.chance, alternative="greater")
    return Acceptance(
        direct_accuracy=after.direct,
        chance=after.chance,
        p_value=float(test.pvalue),
        retained_before=before.retained,
        retained_after=after.retained,
        probe_before=before.probe,
        probe_after=after.probe,
    )


@dataclass(frozen=True, kw_only=True)
class _State:
    direct: float
    chance: float
    retained: float
    probe: float


def _state(
    model: Model, facts: Sequence[Fact], retained: Sequence[Fact], training: Sequence[Fact], layer: int
) -> _State:
    plain = [replace(fact, target_new=None) for fact in facts]
    scores = score_facts(model, plain)
    return _State(
        direct=float(scores["correct"].to_numpy().mean()),
        chance=float(scores["chance"].to_numpy().mean()),
        retained=float(score_facts(model, retained)["correct"].to_numpy().mean()),
        probe=_probe_accuracy(model, facts, training, layer),
    )


def _probe_accuracy(model: Model, facts: Sequence[Fact], training: Sequence[Fact], layer: int) -> float:
    """Of a probe after `layer` blocks at the subject's last token, averaged over the facts it can be trained for."""
    hits: list[bool] = []
    for relation in sorted({fact.relation for fact in facts}):
        known = [fact for fact in training if fact.relation == relation]
        asked = [fact for fact in facts if fact.relation == relation]
        if len({fact.target_true for fact in known}) < 2:
            continue
        at = {name: residual_features(model, part, sites=["subject_last"])["subject_last"][:, layer]
              for name, part in (("known", known), ("asked", asked))}  # fmt: skip
        probe = fit_probe(at["known"], [fact.target_true for fact in known], max_steps=100)
        hits += [a == fact.target_true for a, fact in zip(probe.predict(at["asked"]), asked, strict=True)]
    return float(np.mean(hits)) if hits else 0.0
