"""Is a circuit enough, and is it needed? MIB's curves over circuit sizes, for circuits of components."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.activations import Change, Place, by_place, hooked, last_logits, untouched
from mechunlearn.components import Component, ComponentScores, Reduction
from mechunlearn.facts import Fact
from mechunlearn.html_card import html_card
from mechunlearn.localize.first_order import places_of
from mechunlearn.localize.pairs import PairBatch, batches, build_pairs
from mechunlearn.models import Model, n_parts

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all components: the benchmark's ten circuit sizes."""


@dataclass(frozen=True, kw_only=True)
class FaithfulnessCurve:
    """f(k) over circuit sizes k: 0 as bad as the corrupt run, 1 as good as the whole model; can leave [0, 1]."""

    method: str
    sizes: tuple[float, ...]
    n_components: tuple[int, ...]
    f: Float[np.ndarray, " size"]
    completeness: Float[np.ndarray, " size"]
    """The same for everything but the circuit: near 0 where nothing outside it carries the facts."""

    @property
    def cpr(self) -> float:
        """Area under f: higher is better. Not bounded by 1."""
        return float(np.trapezoid(self.f, self.sizes))

    @property
    def cmd(self) -> float:
        """Area under |1 - f|: lower is better; 0 where every circuit does just what the model does."""
        return float(np.trapezoid(np.abs(1 - self.f), self.sizes))

    @property
    def cpr_log(self) -> float:
        """Mean of f over log k, so that small circuits count as much as large ones."""
        logs = np.log(self.sizes)
        return float(np.trapezoid(self.f, logs) / (logs[-1] - logs[0]))

    def _repr_html_(self) -> str:
        rows = zip(self.sizes, self.n_components, self.f.tolist(), self.completeness.tolist(), strict=True)
        lines = {"CPR (higher is better)": f"{self.cpr:.3f}", "CMD (lower is better)": f"{self.cmd:.3f}"}
        return html_card(f"{self.method}: faithfulness", lines, [("share", "components", "f", "without them"), *rows])


def faithfulness(
    model: Model,
    facts: Sequence[Fact],
    scores: ComponentScores,
    *,
    sizes: Sequence[float] = SIZES,
    order: Reduction = "mean",
    batch_size: int = 32,
    seed: int = 0,
) -> FaithfulnessCurve:
    """Keep the highest components, give all others their output on the donor's run, see how much of the fact is left.

    f(k) = (m(circuit of the best k) - m(corrupt)) / (m(clean) - m(corrupt)), with m the mean logit(true) - logit
    (donor's) over pairs. A circuit has int(k * number of components) members; embeddings are always in it, and an empty
    one counts as the corrupt run. CPR = area under f, CMD = area under |1 - f|, both over linear k by the trapezoid
    rule.

    Sign and units: share of the logit difference.

    Args:
        scores: all of one granularity (sublayers, or heads and MLPs, or neurons): those outside a circuit are replaced.
        order: how per-fact scores make a ranking, see `ComponentScores.reduced`.

    Raises:
        ValueError: overlapping components (a head and its sublayer), sizes not rising within (0, 1], or clean and
            corrupt runs that do not differ.

    Differs from the source: circuits of components, not of edges; tokens aligned by role.
    Source: Mueller et al. 2025 (MIB), arXiv:2504.13151, section 3.2.
    """
    check_disjoint(scores.components)
    if not sizes or not all(0 < size <= 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"faithfulness: got sizes {list(sizes)}, allowed: rising shares in (0, 1]")
    ranked = scores.ranking(order)
    counts = [int(size * len(ranked)) for size in sizes]
    everything = frozenset(ranked)
    kept = {count: frozenset(ranked[:count]) for count in counts}
    circuits = [*kept.values(), *(everything - circuit for circuit in kept.values())]
    clean, corrupt, found = circuit_metrics(model, facts, circuits, everything, batch_size=batch_size, seed=seed)
    if abs(clean - corrupt) < 1e-6:
        raise ValueError("faithfulness: clean and corrupt runs do not differ; take facts that the model knows")
    share = {circuit: (m - corrupt) / (clean - corrupt) for circuit, m in zip(circuits, found, strict=True)}
    return FaithfulnessCurve(
        method=scores.method, sizes=tuple(sizes), n_components=tuple(counts),
        f=np.array([share[kept[count]] if count else 0.0 for count in counts]),
        completeness=np.array([share[everything - kept[count]] if count < len(ranked) else 0.0 for count in counts]),
    )  # fmt: skip


def minimality(
    model: Model, facts: Sequence[Fact], circuit: Collection[Component], among: Collection[Component], *,
    batch_size: int = 32, seed: int = 0,
) -> dict[Component, float]:  # fmt: skip
    """What each member is needed for: drop of f when it alone leaves the circuit; near 0 means it is not needed.

    Raises:
        ValueError: overlapping components, or a circuit with members that are not `among` them.
    """
    check_disjoint(among)
    members = sorted(circuit)
    if not set(members) <= set(among):
        raise ValueError("minimality: the circuit has members that are not among the components; name all of them")
    without = [frozenset(members) - {member} for member in members]
    clean, corrupt, (whole, *rest) = circuit_metrics(
        model, facts, [frozenset(members), *without], among, batch_size=batch_size, seed=seed
    )
    return {member: (whole - m) / (clean - corrupt) for member, m in zip(members, rest, strict=True)}


def circuit_metrics(
    model: Model, facts: Sequence[Fact], circuits: Sequence[Collection[Component]], among: Collection[Component], *,
    batch_size: int = 32, seed: int = 0,
) -> tuple[float, float, list[float]]:  # fmt: skip
    """Mean metric of the clean run, of the corrupt run, and of the clean run with only one circuit left, for each."""
    places = places_of(sorted(among))
    sums = np.zeros(len(circuits) + 2)
    pairs = build_pairs(model, facts, seed=seed)
    with untouched(model), torch.no_grad():
        for batch in batches(model, pairs, batch_size):
            sums[0] += float(batch.logit_diff(last_logits(model, batch.clean)).sum())
            with hooked(model, record=places) as donor:
                sums[1] += float(batch.logit_diff(last_logits(model, batch.corrupt)).sum())
            for i, circuit in enumerate(circuits, start=2):
                out = [component for component in among if component not in circuit]
                with hooked(model, change=replacements(model, batch, out, donor)):
                    sums[i] += float(batch.logit_diff(last_logits(model, batch.clean)).sum())
    clean, corrupt, *rest = (sums / len(pairs)).tolist()
    return clean, corrupt, rest


def replacements(
    model: Model, batch: PairBatch, components: Sequence[Component], donor: Mapping[Place, Tensor]
) -> dict[Place, Change]:
    """Changes that give the components their output on the donor's run at all tokens that both prompts have."""
    row, k = batch.roles.any(dim=2).nonzero(as_tuple=True)
    to, source = batch.clean_positions[row, k], batch.corrupt_positions[row, k]

    def change(place: Place, parts: list[int]) -> Change:
        def put(value: Tensor) -> Tensor:
            split = (n_parts(model, place[0]), -1)
            changed, new = value.clone().unflatten(-1, split), donor[place].unflatten(-1, split)
            at = torch.tensor(parts, device=value.device)
            changed[row[:, None], to[:, None], at] = new[row[:, None], source[:, None], at]
            return changed.flatten(-2)

        return put

    return {
        place: change(place, [components[number].index or 0 for number in numbers])
        for place, numbers in by_place(components).items()
    }


def check_disjoint(components: Collection[Component]) -> None:
    """Refuse components that contain one another.

    Raises:
        ValueError: a head beside its attention sublayer, or a neuron beside its MLP.
    """
    whole: Callable[[Component], Component] = lambda c: Component("mlp" if c.kind == "neuron" else "attention", c.layer)  # noqa: E731
    if inside := [c for c in components if c.index is not None and whole(c) in components]:
        raise ValueError(
            f"circuit: got {inside[0]} beside {whole(inside[0])}, which contains it; score one granularity"
        )
