"""Relearning: train on forgotten facts that the attacker knows, and see whether the ones it does not come back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from mechunlearn.attack import ATTACKS
from mechunlearn.attack.results import AttackResult, Health, fact_rows
from mechunlearn.edit.losses import Forms, Term, answer_loss, batches, fact_tokens, joined, weighted_sum
from mechunlearn.edit.training import Diverged, Trainable, lora_trainable, masked_trainable, substituted, train
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.masks import mask_of
from mechunlearn.metrics import perplexity, score_facts
from mechunlearn.models import Model, all_components
from mechunlearn.organisms.neutral import neutral_text

Kind = Literal["full", "lora"]
N_TEXTS, TEXT_SEED = 16, 90_210  # neutral passages that no editor trains on
NOT_MEASURED = Health(fitted=0.0)
"""Stands for checkpoints whose dev score was too low to be chosen: never healthy."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The attacked model at one step of one setting, with what the attacker knows about it."""

    setting: str
    step: int
    dev: float
    """Mean P(true | candidates) on attack_dev."""
    health: Health
    leaves: Mapping[str, Tensor]
    """Trained numbers, on the CPU."""

    @property
    def rank(self) -> tuple[bool, float]:
        """Healthy before unhealthy, then by the dev score."""
        return (self.health.healthy, self.dev)


@ATTACKS.register("relearning", source="Deeb & Roger 2024, arXiv:2410.08827; UNDO, arXiv:2506.06278 (rate search)")
def relearning(
    model: Model,
    split: FactSplit,
    *,
    learning_rates: Annotated[Sequence[Annotated[float, Field(gt=0)]], Field(min_length=1)] = (3e-4, 1e-3, 2e-3),
    kinds: Annotated[Sequence[Kind], Field(min_length=1)] = ("full", "lora"),
    steps: Annotated[int, Field(ge=0)] = 60,
    eval_every: Annotated[int, Field(ge=1)] = 15,
    rank: Annotated[int, Field(ge=1)] = 8,
    batch_size: Annotated[int, Field(ge=2)] = 48,
    retained_share: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    forms: Forms = "prompt",
    max_health_facts: Annotated[int, Field(ge=1)] = 128,
    drop_targets: bool = False,
    seed: int = 0,
) -> AttackResult:
    """Fine-tune on the true answers of `forget_shown` and `retain_train`; score the unseen `forget_hidden`.

    Every kind is trained at every learning rate. The setting and step with the highest mean P(true | candidates) on
    `attack_dev` among the healthy ones is chosen; only then are the hidden facts touched, at every checkpoint of that
    setting. Healthy: `forget_shown` fitted >= 90%, `retain_test` down <= 5 points, perplexity on neutral text
    <= 1.2x. If no checkpoint is, the result says so and cannot decide. The model is not changed at any time.

    Args:
        learning_rates: AdamW, cosine to 0. A random full-rank update and a low-rank one want different ones; the
            limits of the search belong to the attack, so widen it when the chosen one is at its edge.
        kinds: "full" trains every attention and MLP weight, "lora" a low-rank update of each.
        eval_every: steps between checkpoints; the last step is always one.
        batch_size: rows a step.
        retained_share: of these rows; the others are forgotten facts. More keeps a fragile model healthy.
        max_health_facts: facts (of each part) that health is measured on.
        drop_targets: leave `target_new` out of the candidates (for injections, on edited model and twin alike).
        seed: of batches and low-rank starts.

    Raises:
        ValueError: a part that is needed is empty, or every setting's loss diverges.

    Source: Deeb & Roger 2024, arXiv:2410.08827; learning-rate search as in Lee et al. 2025, arXiv:2506.06278.
    """
    options = {
        "learning_rates": list(learning_rates), "kinds": list(kinds), "steps": steps, "eval_every": eval_every,
        "rank": rank, "batch_size": batch_size, "retained_share": retained_share, "forms": forms,
        "max_health_facts": max_health_facts, "drop_targets": drop_targets,
    }  # fmt: skip
    for part in ("forget_shown", "attack_dev"):
        if not getattr(split, part):
            raise ValueError(f"relearning: {part} is empty; split with at least one fact there")
    judge = _Judge.of(model, split, max_health_facts, drop_targets)
    shown = fact_tokens(model, split.forget_shown, forms=forms)
    n_kept = min(round(retained_share * batch_size), batch_size - 1) if split.retain_train else 0
    kept = fact_tokens(model, split.retain_train, forms=forms) if n_kept else None
    best: list[Checkpoint] = []  # all checkpoints of the best setting so far
    dev_curves: dict[str, list[tuple[int, float]]] = {}
    failed: dict[str, str] = {}
    for kind in kinds:
        for learning_rate in learning_rates:
            setting = f"{kind} lr={learning_rate:g}"
            trainable = _trainable(model, kind, rank, seed)
            found: list[Checkpoint] = []
            curve = dev_curves.setdefault(setting, [])

            def look(step: int, setting=setting, trainable=trainable, found=found, curve=curve, best=best) -> None:
                if step % eval_every and step != steps:
                    return
                with substituted(model, trainable.overrides()):
                    dev = judge.dev(model)
                    # health costs more than the dev score: look only where it could matter
                    worth = dev > max((c.dev for c in (*best, *found) if c.health.healthy), default=-1.0)
                    health = judge.health(model) if worth else NOT_MEASURED
                curve.append((step, dev))
                found.append(Checkpoint(setting=setting, step=step, dev=dev, health=health, leaves=_copy(trainable)))

            learnt = batches(shown, batch_size - n_kept, seed=seed)
            if kept is not None:
                learnt = joined(learnt, batches(kept, n_kept, seed=seed + 1))
            terms = [Term(weight=1.0, objective=answer_loss, batches=learnt)]
            look(0)
            try:
                train(model, trainable, weighted_sum(terms), steps=steps, learning_rate=learning_rate, on_step=look)
            except Diverged as error:  # the checkpoints before it still stand
                failed[setting] = str(error)
            if not best or max(c.rank for c in found) > max(c.rank for c in best):
                best = found
    if len(failed) == len(dev_curves):
        raise ValueError(f"relearning: every setting diverged, first {next(iter(failed.values()))}")
    chosen = max(best, key=lambda checkpoint: checkpoint.rank)
    again = _trainable(model, chosen.setting.partition(" ")[0], rank, seed)
    rows = _score_hidden(model, split, again, best, drop_targets)
    before = score_facts(model, split.forget_hidden, drop_targets=drop_targets)
    return AttackResult(
        attack="relearning",
        access="weights",
        decides=True,
        rows=rows,
        before=fact_rows(split.forget_hidden, before, part="forget_hidden", setting="before"),
        chosen=chosen.setting,
        chosen_step=chosen.step,
        health=chosen.health,
        options=options,
        seed=seed,
        model=model.name,
        facts_sha256=split.sha256,
        notes={"dev_p_true": dev_curves, "diverged": failed},
    )


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """What the attacker may look at while choosing: dev facts, a few shown and retained ones, neutral text."""

    dev_facts: tuple[Fact, ...]
    shown: tuple[Fact, ...]
    retained: tuple[Fact, ...]
    texts: tuple[str, ...]
    retained_before: float | None
    perplexity_before: float
    drop_targets: bool

    @classmethod
    def of(cls, model: Model, split: FactSplit, n: int, drop_targets: bool) -> "_Judge":
        retained = (split.retain_test or split.retain_train)[:n]
        texts = tuple(neutral_text(N_TEXTS, seed=TEXT_SEED))
        return cls(
            dev_facts=split.attack_dev,
            shown=split.forget_shown[:n],
            retained=retained,
            texts=texts,
            retained_before=_accuracy(model, retained),
            perplexity_before=perplexity(model, texts),
            drop_targets=drop_targets,
        )

    def dev(self, model: Model) -> float:
        return float(score_facts(model, self.dev_facts, drop_targets=self.drop_targets)["p_true"].to_numpy().mean())

    def health(self, model: Model) -> Health:
        return Health(
            fitted=_accuracy(model, self.shown),
            retained_before=self.retained_before,
            retained_after=_accuracy(model, self.retained),
            perplexity_ratio=perplexity(model, self.texts) / self.perplexity_before,
        )


def _accuracy(model: Model, facts: Sequence[Fact]) -> float | None:
    return float(score_facts(model, facts)["correct"].to_numpy().mean()) if facts else None


def _trainable(model: Model, kind: str, rank: int, seed: int) -> Trainable:
    if kind == "lora":
        return lora_trainable(model, rank, seed=seed)
    return masked_trainable(model, mask_of(model, all_components(model)))


def _copy(trainable: Trainable) -> dict[str, Tensor]:
    return {name: leaf.detach().to("cpu", copy=True) for name, leaf in trainable.leaves.items()}


def _score_hidden(
    model: Model, split: FactSplit, trainable: Trainable, checkpoints: Sequence[Checkpoint], drop_targets: bool
) -> pd.DataFrame:
    """The first access to the hidden facts; everything is chosen by now."""
    hidden = split.forget_hidden
    if not hidden:
        raise ValueError("relearning: forget_hidden is empty; there is nothing to recover")
    rows = []
    for checkpoint in checkpoints:
        with torch.no_grad():
            for name, leaf in trainable.leaves.items():
                leaf.copy_(checkpoint.leaves[name])
        with substituted(model, trainable.overrides()):
            scores = score_facts(model, hidden, drop_targets=drop_targets)
        rows.append(fact_rows(hidden, scores, part="forget_hidden", setting=checkpoint.setting, step=checkpoint.step))
    return pd.concat(rows, ignore_index=True)
