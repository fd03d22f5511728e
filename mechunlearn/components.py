"""Components of a model, named as TransformerLens names them, and the scores that localizers give them.

No torch here: names and numbers only.
"""

# pandas, numpy's argsort and safetensors are only partly typed; all else in this file is checked strictly
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mechunlearn.files import whole_file
from mechunlearn.html_card import html_card
from mechunlearn.rankings import bootstrap_rankings

Kind = Literal["mlp", "attention", "head", "neuron"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Matrix = Literal["in", "gate", "out", "q", "k", "v", "o"]
"""A layer's matrices, each with its bias: the MLP's in (up), gate (where gated) and out (down); attention's q, k, v
and o(utput). Where query, key and value are one parameter, each is its own outputs of it."""
MATRICES: tuple[Matrix, ...] = get_args(Matrix)

ROLES = ("subject_first", "subject_middle", "subject_last", "between", "last")
"""Roles of the tokens of a prompt; "between" is every other token before the last, those before the subject too."""

Reduction = Literal["mean", "mean_of_abs", "abs_of_mean"]
"""How scores of single facts make one of a component; they rank differently."""

_SHORT = re.compile(r"(?:m(?P<mlp>\d+)(?:\.n(?P<neuron>\d+))?|a(?P<attention>\d+)(?:\.h(?P<head>\d+))?)", re.ASCII)
_HOOKS = {"mlp": "hook_mlp_out", "attention": "hook_attn_out", "head": "attn.hook_z", "neuron": "mlp.hook_post"}


@dataclass(frozen=True, order=True)
class Component:
    """A part of the model that can be scored and edited.

    `m3` is an MLP, `a5` an attention sublayer, `a5.h2` a head and `m3.n117` an MLP neuron.
    """

    kind: Kind
    layer: int
    index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"component kind: got {self.kind!r}, allowed: {', '.join(KINDS)}")
        if self.layer < 0 or (self.index is not None and self.index < 0):
            raise ValueError(f"component: got layer {self.layer}, index {self.index}, allowed: 0 and up")
        if (self.index is not None) != (self.kind in ("head", "neuron")):
            raise ValueError(f"component {self.kind} of layer {self.layer}: got index {self.index}; heads and neurons "
                             "have one, MLPs and attention sublayers none")  # fmt: skip

    def __str__(self) -> str:
        sublayer = f"{'m' if self.kind in ('mlp', 'neuron') else 'a'}{self.layer}"
        return sublayer if self.index is None else f"{sublayer}.{self.kind[0]}{self.index}"

    @classmethod
    def parse(cls, text: str) -> "Component":
        """Read a component from its short form.

        Raises:
            ValueError: the text is not of the form m3, a5, a5.h2 or m3.n117.
        """
        found = _SHORT.fullmatch(text)
        if not found:
            raise ValueError(
                f"component: got {text!r}, allowed: m3 (MLP), a5 (attention), a5.h2 (head), m3.n117 (neuron)"
            )
        sublayer: Kind = "mlp" if found["mlp"] else "attention"
        inner: Kind = "neuron" if found["mlp"] else "head"
        index = found[inner]
        return cls(inner if index else sublayer, int(found[sublayer]), int(index) if index else None)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices that it can have entries of."""
        return MATRICES[:3] if self.kind in ("mlp", "neuron") else MATRICES[3:]

    @property
    def tl_name(self) -> str:
        """The TransformerLens hook where this component's activation is seen (of all heads or neurons at once)."""
        return f"blocks.{self.layer}.{_HOOKS[self.kind]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ComponentScores:
    """How much each component matters for each fact, by the role of the token.

    Shapes: per_fact [fact component role].
    """

    method: str
    metric: str
    sign: str
    """What a positive number means, in words and units."""
    components: tuple[Component, ...]
    roles: tuple[str, ...] = ROLES
    per_fact: Float[np.ndarray, "fact component role"]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    facts_sha256: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Anything else worth keeping that JSON can hold."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_fact", np.ascontiguousarray(self.per_fact, dtype=np.float64))
        expected = (len(self.components), len(self.roles))
        if self.per_fact.ndim != 3 or self.per_fact.shape[1:] != expected or not self.per_fact.shape[0]:
            raise ValueError(f"scores of '{self.method}': got shape {self.per_fact.shape}, allowed: "
                             f"(at least one fact, {expected[0]} components, {expected[1]} roles)")  # fmt: skip
        if len(set(self.components)) != len(self.components) or len(set(self.roles)) != len(self.roles):
            raise ValueError(f"scores of '{self.method}': a component or role is listed twice; list each once")
        if not np.isfinite(self.per_fact).all():
            bad = self.components[int(np.argwhere(~np.isfinite(self.per_fact))[0][1])]
            raise ValueError(f"scores of '{self.method}': not finite at {bad}; check the model's numerics")

    @property
    def n_facts(self) -> int:
        """Number of facts scored."""
        return self.per_fact.shape[0]

    @cached_property
    def values(self) -> Float[np.ndarray, " component"]:
        """Score of each component: sum over token roles, mean over facts."""
        return self.per_fact.sum(axis=2).mean(axis=0)

    @cached_property
    def by_role(self) -> Float[np.ndarray, "component role"]:
        """Score of each component at each token role: mean over facts."""
        return self.per_fact.mean(axis=0)

    @cached_property
    def standard_error(self) -> Float[np.ndarray, " component"]:
        """Standard error of `values` over facts; NaN for a single fact."""
        if self.n_facts < 2:
            return np.full(len(self.components), np.nan)
        return self.per_fact.sum(axis=2).std(axis=0, ddof=1) / np.sqrt(self.n_facts)

    @cached_property
    def stability(self) -> tuple[float, float]:
        """Would other facts have ranked the components so? Mean and 5% quantile of Spearman's correlation over draws.

        Facts are drawn with replacement; NaN where all have the same scores. `localize.stability` draws subjects and
        asks in other words, too.
        """
        return bootstrap_rankings(self.per_fact.sum(axis=2), np.ones(self.n_facts))

    def at(self, *roles: str) -> "ComponentScores":
        """The same scores at some of the token roles only.

        Raises:
            ValueError: a role that was not scored.
        """
        if unknown := [role for role in roles if role not in self.roles]:
            raise ValueError(f"scores of '{self.method}': got role {unknown[0]!r}, allowed: {', '.join(self.roles)}")
        columns = [self.roles.index(role) for role in roles]
        return replace(self, roles=roles, per_fact=self.per_fact[:, :, columns])

    def reduced(self, how: Reduction = "mean") -> Float[np.ndarray, " component"]:
        """One number a component, summed over token roles.

        mean: `values`, signed; what speaks for some facts and against others cancels. abs_of_mean: its size.
        mean_of_abs: mean over facts of the size, so that nothing cancels; noise adds up too.

        Raises:
            ValueError: an unknown reduction.
        """
        if how not in get_args(Reduction):
            raise ValueError(f"scores of '{self.method}': got reduction {how!r}, allowed: {get_args(Reduction)}")
        if how == "mean_of_abs":
            return np.abs(self.per_fact.sum(axis=2)).mean(axis=0)
        return np.abs(self.values) if how == "abs_of_mean" else self.values

    def ranking(self, how: Reduction = "mean") -> tuple[Component, ...]:
        """Components by descending score, reduced so; ties keep the order of `components`."""
        return tuple(self.components[i] for i in np.argsort(-self.reduced(how), kind="stable"))

    def to_frame(self) -> pd.DataFrame:
        """One row per component: component, kind, layer, index, value, standard_error and one column per role."""
        frame = pd.DataFrame(
            {
                "component": [str(c) for c in self.components],
                "kind": [c.kind for c in self.components],
                "layer": [c.layer for c in self.components],
                "index": pd.array([c.index for c in self.components], dtype="Int64"),
                "value": self.values,
                "standard_error": self.standard_error,
            }
        )
        return frame.assign(**{role: self.by_role[:, i] for i, role in enumerate(self.roles)})

    def _repr_html_(self) -> str:
        largest = np.argsort(-np.abs(self.values), kind="stable")[:8]
        rows = [(self.components[i], float(self.values[i]), float(self.standard_error[i])) for i in largest]
        mean, lower = self.stability
        same = "undefined" if np.isnan(mean) else f"{mean:.2f} (5% quantile {lower:.2f})"
        lines = {
            "metric": self.metric, "sign": self.sign, "facts": self.n_facts, "roles": ", ".join(self.roles),
            "rank correlation with other draws of the facts": same,
            "components": f"{len(self.components)}, the largest:",
        }  # fmt: skip
        return html_card(self.method, lines, [("component", "score", "standard error"), *rows])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (numbers) with a JSON record in its header, all or nothing."""
        record = asdict(self) | {"components": [str(c) for c in self.components]}
        del record["per_fact"]
        text = json.dumps(record, allow_nan=False, sort_keys=True)
        with whole_file(path) as partial:
            save_file({"per_fact": self.per_fact}, partial, metadata={"record": text})

    @classmethod
    def load(cls, path: str | Path) -> "ComponentScores":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a saved ComponentScores.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no scores file at {path}; write one with ComponentScores.save")
        try:
            with safe_open(str(path), framework="np") as file:
                record = json.loads(file.metadata()["record"])
                per_fact = file.get_tensor("per_fact")
            names = record.pop("components")
            return cls(
                **record | {"components": tuple(map(Component.parse, names)), "roles": tuple(record["roles"])},
                per_fact=per_fact,
            )
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a saved ComponentScores ({type(error).__name__}); save it anew") from None
