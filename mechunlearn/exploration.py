"""What an explorer computes when something is picked: runs, maps of one prompt, and what an intervention does.

No widgets here: `explorer` shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Place, hooked, last_logits, pad, place_of, untouched
from mechunlearn.components import ROLES, Component, ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.lens_map import LensMap, lens_map
from mechunlearn.localize.pairs import SUBJECT_ROLES, Pair, build_pairs
from mechunlearn.localize.patching_map import PatchingMap, patching_map
from mechunlearn.models import Model, n_parts
from mechunlearn.prompts import token_texts

How = Literal["zero", "mean", "donor"]
"""What a component writes instead: nothing, its mean over the facts at that role, or what it does on the other run."""
HOWS: tuple[How, ...] = get_args(How)
RunName = Literal["clean", "corrupt"]
RUNS: tuple[RunName, ...] = get_args(RunName)
_COVERS = {"all": ROLES, "subject": SUBJECT_ROLES}  # roles of localizers that score several of ours at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What two runs say next: the likeliest tokens of both, the true and the donor's answer among them."""

    true: str
    before: Mapping[str, float]
    """Probability of each answer among the whole vocabulary."""
    after: Mapping[str, float]
    """Of the same answers."""
    logit_diff_before: float
    """Logit of the true minus logit of the donor's answer."""
    logit_diff_after: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """A fact's prompt and its donor's; `outcome` is the clean run's and then the corrupt run's."""

    clean: tuple[str, ...]
    corrupt: tuple[str, ...]
    donor: str | None
    outcome: Outcome


class Exploration:
    """One model and some facts; facts are named by their index.

    Scores, maps and means are kept: make a new one after the model's weights were changed.

    Args:
        retain: facts to keep, for the localizers that contrast with them.
        twin: a model that never knew the facts, for the localizers that compare with one.
        seed: of the donors and of what localizers draw.

    Raises:
        ValueError: no facts, or a fact that cannot be paired.
    """

    def __init__(
        self, model: Model, facts: Sequence[Fact], *, retain: Sequence[Fact] | None = None, twin: Model | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.facts, self.retain, self.twin, self.seed = model, tuple(facts), retain, twin, seed
        self.pairs = {pair.fact: pair for pair in build_pairs(model, self.facts, seed=seed)}
        self._scores: dict[tuple[str, str | None], ComponentScores] = {}
        self._patching: dict[int, PatchingMap] = {}
        self._means: dict[Place, Float[Tensor, "role width"]] = {}

    def metrics(self, localizer: str) -> tuple[str, ...]:
        """The metrics that a localizer lets one choose from; none if there is no choice."""
        field = LOCALIZERS.get(localizer).options.model_fields.get("metric")
        return tuple(map(str, get_args(field.annotation))) if field else ()

    def scores(self, localizer: str, metric: str | None = None) -> ComponentScores:
        """The localizer's scores of all facts.

        Raises:
            ValueError: unknown localizer or metric, or facts that it cannot score.
            NotSupported: a model that it cannot score.
        """
        key = localizer, metric
        if key not in self._scores:
            method = LOCALIZERS.get(localizer)
            options = method.validate({"metric": metric} if metric else {})
            options |= method.wanted(retain=self.retain, twin=self.twin, seed=self.seed)
            self._scores[key] = method.function(self.model, self.facts, **options)
        return self._scores[key]

    def token_scores(self, fact: int, scores: ComponentScores) -> Float[np.ndarray, "component token"]:
        """Scores of all facts, for one of them at its prompt's tokens; a role's score is shared evenly by its tokens.

        Localizers score roles, so only the sum over the tokens of a role was measured.
        """
        roles = roles_of(self._pair(fact))
        values = np.zeros((len(scores.components), len(roles)))
        for column, role in enumerate(scores.roles):
            at = [i for i, own in enumerate(roles) if own in _COVERS.get(role, (role,))]
            values[:, at] += scores.per_fact[fact, :, column, None] / max(len(at), 1)
        return values

    def token_of(self, fact: int, role: str) -> int | None:
        """The last token of a role that a localizer scores; None for all tokens, or if the prompt has none."""
        covered = _COVERS.get(role, (role,))
        at = [i for i, own in enumerate(roles_of(self._pair(fact))) if own in covered]
        return at[-1] if at and role != "all" else None

    def patching(self, fact: int) -> PatchingMap:
        """Exact patching of every sublayer at every token of the fact's prompt."""
        if fact not in self._patching:
            relation = self.facts[fact].relation
            others = [other for other in self.facts if other.relation == relation]
            self._patching[fact] = patching_map(self.model, self.facts[fact], others, seed=self.seed)
        return self._patching[fact]

    def lens(self, fact: int) -> LensMap:
        """What the stream would say next at every token after every sublayer."""
        return lens_map(self.model, self.facts[fact])

    def tokens(self, fact: int) -> tuple[str, ...]:
        """The clean prompt's tokens (with the tokens that the true and the donor's answer share)."""
        return token_texts(self.model, self._pair(fact).clean)

    def runs(self, fact: int) -> Runs:
        """The fact's run beside its donor's."""
        pair = self._pair(fact)
        with untouched(self.model), torch.no_grad():
            clean, corrupt = (last_logits(self.model, pad(self.model, [ids]))[0] for ids in (pair.clean, pair.corrupt))
        return Runs(
            clean=token_texts(self.model, pair.clean), corrupt=token_texts(self.model, pair.corrupt),
            donor=pair.donor, outcome=self._outcome(pair, clean, corrupt),
        )  # fmt: skip

    def intervene(
        self, fact: int, component: Component, how: How, position: int | None = None, *, run: RunName = "clean"
    ) -> Outcome:
        """Change what a component writes at one token of a run, or at all, and ask again.

        Args:
            how: "zero" (its output, a head's z or a neuron's activation becomes 0), "mean" (its mean over the facts at
                tokens of the same role) or "donor" (what it is on the other run at the token's partner).
            position: of a token of the fact's prompt; on the corrupt run its partner is changed. None for all; those
                without a partner stay as they are, unless they become zero, or on the clean run their mean.
            run: which is changed. "clean": does the fact go? "corrupt": does it return, if "donor" gives the donor's
                run what is on the fact's own?

        Raises:
            ValueError: no such component, token, way or run, or a token without a partner in the donor's prompt.
        """
        pair, model = self._pair(fact), self.model
        self._check(component)
        if how not in HOWS or run not in RUNS or not (position is None or 0 <= position < len(pair.clean)):
            raise ValueError(
                f"intervention: got {how!r} at token {position} of the {run} run, allowed: {', '.join(HOWS)} at 0 to "
                f"{len(pair.clean) - 1} or at all of the {' or '.join(RUNS)} run"
            )
        ids = pair.clean if run == "clean" else pair.corrupt
        rows = _rows(pair, how, run)
        own = {c: k for c, k, _ in pair.aligned} if run == "corrupt" else {i: i for i in range(len(ids))}
        if position is not None and own.get(position) not in rows:
            raise ValueError(f"intervention: token {position} has no partner in the donor's prompt; take another token")
        at = list(rows) if position is None else [own[position]]
        place, split, part = place_of(component), (n_parts(model, component.kind), -1), component.index or 0
        with untouched(model), torch.no_grad():
            before = last_logits(model, pad(model, [ids]))[0]
            source = self._source(place, how, pair.corrupt if run == "clean" else pair.clean)

            def change(value: Tensor) -> Tensor:
                changed = value.clone().unflatten(-1, split)
                new = source.unflatten(-1, split).to(value.dtype)
                changed[0, at, part] = new[[rows[i] for i in at], part]
                return changed.flatten(-2)

            with hooked(model, change={place: change}):
                after = last_logits(model, pad(model, [ids]))[0]
        return self._outcome(pair, before, after)

    def _source(self, place: Place, how: How, other: Sequence[int]) -> Float[Tensor, "row width"]:
        """What the place is to be: by token of the other run for "donor", by role for "mean", else one row of zeros."""
        if how == "mean":
            return self._mean(place)
        with hooked(self.model, record=[place]) as seen:
            last_logits(self.model, pad(self.model, [other]))
        return seen[place][0] if how == "donor" else torch.zeros_like(seen[place][0, :1])

    def _mean(self, place: Place, batch_size: int = 32) -> Float[Tensor, "role width"]:
        """Mean over all tokens of a role in all facts' prompts."""
        if place not in self._means:
            total, count = None, torch.zeros(len(ROLES), device=self.model.device)
            pairs = list(self.pairs.values())
            for start in range(0, len(pairs), batch_size):
                some = pairs[start : start + batch_size]
                tokens = pad(self.model, [pair.clean for pair in some])
                with hooked(self.model, record=[place]) as seen:
                    last_logits(self.model, tokens)
                one_hot = torch.zeros(*tokens.ids.shape, len(ROLES), device=self.model.device)
                for row, pair in enumerate(some):
                    for i, role in enumerate(roles_of(pair)):
                        one_hot[row, i, ROLES.index(role)] = 1
                summed = torch.einsum("bpr,bpw->rw", one_hot, seen[place].float())
                total = summed if total is None else total + summed
                count += one_hot.sum(dim=(0, 1))
            assert total is not None  # there is at least one fact
            self._means[place] = total / count.clamp(min=1)[:, None]
        return self._means[place]

    def _check(self, component: Component) -> None:
        if component.layer >= self.model.n_layers or (component.index or 0) >= n_parts(self.model, component.kind):
            raise ValueError(
                f"intervention: got {component}, allowed: layers 0 to {self.model.n_layers - 1}, heads 0 to "
                f"{self.model.n_heads - 1}, neurons 0 to {self.model.d_mlp - 1}"
            )

    def _pair(self, fact: int) -> Pair:
        if fact not in self.pairs:
            raise ValueError(f"fact: got number {fact}, allowed: 0 to {len(self.facts) - 1}")
        return self.pairs[fact]

    def _outcome(self, pair: Pair, before: Tensor, after: Tensor, top: int = 5) -> Outcome:
        p, q = before.double().softmax(-1), after.double().softmax(-1)
        k = min(top, len(p))
        listed = dict.fromkeys(
            (pair.answer, pair.counterfactual, *p.topk(k).indices.tolist(), *q.topk(k).indices.tolist())
        )
        ids = sorted(listed, key=lambda token: -float(p[token]))
        texts = token_texts(self.model, ids)
        names = [
            text if texts.count(text) == 1 else f"{text} ({token})" for text, token in zip(texts, ids, strict=True)
        ]
        return Outcome(
            true=names[ids.index(pair.answer)],
            before=dict(zip(names, p[ids].tolist(), strict=True)),
            after=dict(zip(names, q[ids].tolist(), strict=True)),
            logit_diff_before=float(before[pair.answer] - before[pair.counterfactual]),
            logit_diff_after=float(after[pair.answer] - after[pair.counterfactual]),
        )


def _rows(pair: Pair, how: How, run: RunName) -> dict[int, int]:
    """The tokens of a run that can be changed, and the row of `_source` that each of them gets."""
    if how == "zero":
        return dict.fromkeys(range(len(pair.clean if run == "clean" else pair.corrupt)), 0)
    if run == "corrupt":
        return {k: c if how == "donor" else role for c, k, role in pair.aligned}
    return {c: k for c, k, _ in pair.aligned} if how == "donor" else dict(enumerate(map(ROLES.index, roles_of(pair))))


def roles_of(pair: Pair) -> tuple[str, ...]:
    """The role of every token of a pair's clean prompt, see `prompts.token_roles`."""
    first, last = min(pair.subject), max(pair.subject)
    roles = ["between"] * len(pair.clean)
    roles[-1] = "last"
    roles[first : last + 1] = ["subject_middle"] * (last + 1 - first)
    roles[first] = "subject_first"
    roles[last] = "subject_last"
    return tuple(roles)
