"""What a verdict is made of: the scores of one attack on the edited model and on its twin, and positive controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AttackEvidence:
    """One attack's P(true | candidates) on the hidden facts, one entry a (seed, fact) row.

    Scores put on another scale may be below 0: see `attack.asking` about multiple choice.
    """

    name: str
    facts: tuple[str, ...]
    seeds: tuple[int, ...]
    edited: tuple[float, ...]
    """After the edit and the attack (u)."""
    null: tuple[float, ...]
    """The equally edited and attacked twin (n), row by row; for a proxy null, what guessing gets."""
    zero_budget: bool = False
    """Just asking. Its positive control is the original itself, so it may always decide `hidden`."""
    decides: bool = True
    """False for what only diagnoses: anything that runs or mixes in the original's weights."""
    healthy: bool = True
    health: str = ""
    """What failed, in words, if anything did."""

    def __post_init__(self) -> None:
        if not self.edited or not len(self.edited) == len(self.facts) == len(self.seeds):
            raise ValueError(
                f"attack '{self.name}': got {len(self.edited)} scores for {len(self.facts)} facts; no data, no verdict"
            )
        if not self.null:
            raise ValueError(f"attack '{self.name}': no scores of the twin (or of guessing); no null, no verdict")
        for value in (*self.edited, *self.null):
            if not -1.0 <= value <= 1.0:  # NaN fails this as well
                raise ValueError(
                    f"attack '{self.name}': got P(true) = {value}, allowed: [0, 1], or from -1 if rescaled"
                )


@dataclass(frozen=True, kw_only=True)
class PositiveControl:
    """One kind of suppressed model (knowledge hidden on purpose) and the attacks that got it back."""

    kind: str
    recovered_by: tuple[str, ...]
    accepted: bool = True
    """False: the model was not properly suppressed, so recovering it shows nothing."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PositiveControl":
        """Read back what `dataclasses.asdict` and JSON made of it."""
        fields = dict(data)
        fields["recovered_by"] = tuple(fields["recovered_by"])
        return cls(**fields)


def evidence_by_attack(edited: Sequence[Any], twin: Sequence[Any], *, paired: bool = True) -> list[AttackEvidence]:
    """`gather_evidence` for every attack among the results, in the order in which they first stand."""
    return [
        gather_evidence(*([r for r in results if r.attack == name] for results in (edited, twin)), paired=paired)
        for name in dict.fromkeys(result.attack for result in edited)
    ]


def gather_evidence(edited: Sequence[Any], twin: Sequence[Any], *, paired: bool = True) -> AttackEvidence:
    """Join the results of one attack on the edited model and on its twin, one pair a seed (or fold).

    Args:
        edited: `AttackResult`s of one attack on the edited model, one a seed.
        twin: the same attack on the equally edited twin, in the same order.
        paired: False when `twin` was scored on other facts, such as fabricated ones (a proxy null).

    Raises:
        ValueError: no results, results of different attacks, or of different facts when paired.
    """
    if not edited or len(edited) != len(twin):
        raise ValueError(
            f"verdict: got {len(edited)} results of the edited model and {len(twin)} of the twin; give pairs"
        )
    if len({result.attack for result in (*edited, *twin)}) > 1:
        raise ValueError("verdict: got results of different attacks; gather each attack on its own")
    facts: list[str] = []
    seeds: list[int] = []
    scores: list[float] = []
    nulls: list[float] = []
    made_up: dict[str, list[float]] = {}
    for u, n in zip(edited, twin, strict=True):
        mine, other = u.hidden_scores(), n.hidden_scores()
        if paired and set(mine) != set(other):
            raise ValueError(f"verdict: attack '{u.attack}' scored other facts on the twin; give both the same split")
        facts += list(mine)
        seeds += [u.seed] * len(mine)
        scores += list(mine.values())
        nulls += [other[key] for key in mine] if paired else []
        for key, value in other.items():
            made_up.setdefault(key, []).append(value)
    if not paired:  # the same made-up facts under every seed: more seeds are no more facts
        nulls = [sum(values) / len(values) for values in made_up.values()]
    failed = dict.fromkeys(
        f"{who}: {r.health.reason}"
        for who, rs in (("edited", edited), ("twin" if paired else "made-up facts", twin))
        for r in rs
        if not r.health.healthy
    )
    first = edited[0]
    return AttackEvidence(
        name=first.attack, facts=tuple(facts), seeds=tuple(seeds), edited=tuple(scores), null=tuple(nulls),
        zero_budget=first.zero_budget, decides=first.decides, healthy=not failed, health="; ".join(failed),
    )  # fmt: skip
