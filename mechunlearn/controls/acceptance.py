"""Whether a model is suppressed, and only suppressed: what a positive control must pass before it shows anything."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from mechunlearn.edit.edits import WeightEdit, applied
from mechunlearn.facts import Fact, FactSplit
from mechunlearn.metrics import score_facts
from mechunlearn.models import Model
from mechunlearn.probes import fit_probe, residual_features

MOST_PROBE_DROP = 0.05
LEAST_RETAINED = 0.95  # of the original's accuracy


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Whether a model is suppressed, and only suppressed; accuracies in [0, 1]."""

    direct_accuracy: float
    """On the forgotten facts, asked directly, among their candidates."""
    chance: float
    p_value: float
    """One-sided exact binomial test of direct accuracy above chance."""
    retained_before: float
    retained_after: float
    probe_before: float | None
    """Of a probe halfway through the layers, trained on retained facts, read on the forgotten ones; None where the
    retained facts have fewer than two answers to train on, and nothing can be said."""
    probe_after: float | None

    @property
    def reason(self) -> str:
        """What is missing, in words; empty when accepted."""
        missing = []
        if self.p_value < 0.05:
            missing.append(f"still answers {self.direct_accuracy:.0%} directly (chance {self.chance:.0%})")
        if self.retained_after < LEAST_RETAINED * self.retained_before:
            missing.append(f"retained facts fell from {self.retained_before:.0%} to {self.retained_after:.0%}")
        before, after = self.probe_before, self.probe_after
        if before is not None and after is not None and after < before - MOST_PROBE_DROP:
            missing.append(f"the probe fell from {before:.0%} to {after:.0%}")
        return ", ".join(missing)

    @property
    def accepted(self) -> bool:
        """Only then can recovering the facts show an attack's power."""
        return not self.reason

    @property
    def record(self) -> dict[str, Any]:
        """The numbers with the reason, as kept on disk."""
        return asdict(self) | {"reason": self.reason}


def accept(model: Model, split: FactSplit, edit: WeightEdit, *, max_facts: int = 256) -> Acceptance:
    """Measure whether an edit suppresses the forgotten facts, and only them; see `Acceptance`.

    Accepted if direct accuracy is not above chance (exact binomial test), retained accuracy is at least 95% of the
    original's, and a linear probe halfway through the layers reads the facts within 5 points as well as before (which
    holds by construction where only later layers are changed).
    """
    middle = model.n_layers // 2
    facts, kept = split.forget[:max_facts], split.retain_test[:max_facts] or split.retain_train[:max_facts]
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
    probe: float | None


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


def _probe_accuracy(model: Model, facts: Sequence[Fact], training: Sequence[Fact], layer: int) -> float | None:
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
    return float(np.mean(hits)) if hits else None
