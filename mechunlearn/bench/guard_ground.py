"""What a bench of guards stands on: the facts to forget, those near to them and far from them, and what is measured."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from mechunlearn.edit.edits import Edit, applied
from mechunlearn.facts import Fact, FactSplit, hash_facts
from mechunlearn.features import GUARDS
from mechunlearn.features.dynamic_guardrail import dictionary_for, guard_from
from mechunlearn.features.evidence import Evidence, fired_in, gather_evidence
from mechunlearn.features.guard import Guard
from mechunlearn.metrics import perplexity, score_facts
from mechunlearn.models import Model
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import forms, render

# pandas and scikit-learn have no complete types
# pyright: standard

STRENGTH = 0.3  # mean residual norms
COMMON: Mapping[str, Any] = {"n_features": 20, "mode": "only_fired", "strength": STRENGTH}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "static": {"gate": "none"},
    "dsg": {"gate": "share", "scope": "sequence", "calibration": "quantile", "mode": "all_on_hot"},
    "share": {"gate": "share"},
    "window": {"gate": "window"},
    "cusum": {"gate": "cusum"},
    "random": {"gate": "none", "at_random": True},
}
"""static: always on. dsg: the paper's gate and clamp. share, window, cusum: gates token by token, with a threshold by
split-conformal calibration. random: static, with other features that are on as often in text to retain."""
GATED = ("dsg", "share", "window", "cusum")
Found = Iterator[tuple[str, float, Mapping[str, float]]]
"""What an experiment yields: arm, the experiment's own variable, and measure -> value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """One deal of facts on one model; a class, for parts of it are drawn once and used by every experiment."""

    model: Model
    split: FactSplit
    far: tuple[Fact, ...]
    """Known facts of other relations than those to forget; may be none."""
    dictionary: str | None
    """None: nothing is guarded, as where codes are deleted."""
    topic: str | None
    """What is to be forgotten, in words; None leaves out what chooses features by their descriptions."""
    seed: int = 0
    max_facts: int = 96
    beside: Mapping[str, Model] = field(default_factory=dict)
    """Other models on the same facts, by what they are."""
    bert_model: str | None = None
    """The encoder of BERTScore, where texts are scored; None leaves it out."""
    hook_point: str | None = None
    """Of a dictionary whose file does not say."""
    _read: dict[tuple[str, float, str], Evidence] = field(default_factory=dict)

    def guard(self, arm: str, *, split: FactSplit | None = None, **options: Any) -> Guard:
        """An arm's guard for the facts to forget, or for those of another split."""
        method = GUARDS.get("dynamic_guardrail")
        own = {"dictionary": self.dictionary, "hook_point": self.hook_point}
        given = method.validate({**COMMON, **ARMS[arm], **options, **own})
        given["rule_options"] = given["rule_options"] or {}
        return guard_from(self.model, self._evidence(split or self.split, given), given)

    def _evidence(self, split: FactSplit, options: Mapping[str, Any]) -> Evidence:
        """Read once for all guards on the same facts, with the same share of them and the dictionary folded or not."""
        share = options["data_share"]
        key = (hash_facts((*split.forget, *split.retain_train)), share, options["units"])
        if key not in self._read:
            found = dictionary_for(self.model, options)
            self._read[key] = gather_evidence(self.model, split, found, data_share=share, seed=self.seed)
        return self._read[key]

    def on(self, name: str) -> "Ground":
        """The same facts on a model that stands beside."""
        return replace(self, model=self.beside[name], _read={})

    @cached_property
    def parts(self) -> dict[str, list[Fact]]:
        """forget; near: facts of the same relations that no guard was made on; far: of others. Drawn where too many."""
        relations = {fact.relation for fact in self.split.forget}
        near = [fact for fact in self.split.retain_test if fact.relation in relations]
        parts = {"forget": self.split.forget, "near": near, "far": self.far}
        return {name: self.drawn(facts) for name, facts in parts.items() if facts}

    def drawn(self, facts: Sequence[Fact]) -> list[Fact]:
        """At most `max_facts` of them."""
        if len(facts) <= self.max_facts:
            return list(facts)
        return random.Random(f"ground|{self.seed}").sample(list(facts), self.max_facts)

    def inside(self, edit: Edit | None) -> AbstractContextManager[object]:
        """The model under an edit, or as it is."""
        return nullcontext() if edit is None else applied(self.model, edit)

    def measured(self, edit: Edit | None) -> dict[str, float]:
        """Of the model under an edit: mean P(true | candidates) of every part by prompt, and of `forget` otherwise.

        variants: mean over the other forms that the facts to forget have (but for multiple choice). perplexity: on
        neutral text, over the unedited model's.
        """
        plain = self.plain_perplexity  # measured before the edit is on, as it is kept
        with self.inside(edit):
            return self._measured() | {"perplexity": self._perplexity() / plain}

    def _measured(self) -> dict[str, float]:
        found = {name: self.p_true(facts) for name, facts in self.parts.items()}
        own = self.parts["forget"]
        others = [form for form in forms(own[0]) if form not in ("prompt", "choice")]
        if others:
            found["variants"] = float(np.mean([self.p_true(own, form) for form in others]))
        return found

    def p_true(self, facts: Sequence[Fact], form: str = "prompt") -> float:
        """Mean P(true | candidates)."""
        return float(np.mean(score_facts(self.model, facts, form, seed=self.seed)["p_true"].to_numpy()))

    @cached_property
    def plain_perplexity(self) -> float:
        """Of the unedited model."""
        return self._perplexity()

    def _perplexity(self) -> float:
        return perplexity(self.model, neutral_text(40, self.seed + 1))

    def opened(self, guard: Guard) -> dict[str, float]:
        """Share of the prompts of every part, and of neutral texts, that open the guard's gate at some token.

        auroc: how well the gate's score tells prompts to forget from those near to them, whatever the threshold.
        """
        assert guard.gate is not None
        texts = {name: [render(fact, "prompt") for fact in facts] for name, facts in self.parts.items()}
        texts["text"] = neutral_text(100, self.seed + 1)
        own = guard.dictionary.to(self.model.device)
        fired = {
            name: fired_in(self.model, own, said)[1].flags(guard.places, own.d_sae) for name, said in texts.items()
        }
        peaks = {name: guard.gate.peaks(flags) for name, flags in fired.items()}
        found = {f"opens on {name}": float((of > guard.gate.threshold).mean()) for name, of in peaks.items()}
        if "near" in peaks:
            truth = np.repeat([1, 0], [len(peaks["forget"]), len(peaks["near"])])
            found["auroc"] = float(roc_auc_score(truth, np.concatenate([peaks["forget"], peaks["near"]])))
        return found
