"""How well a ranking of components finds the planted ones: hits, recall, reciprocal ranks, with intervals."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb, isfinite, nan
from typing import cast

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from mechunlearn.components import Component, ComponentScores, Kind, Reduction
from mechunlearn.statistics import Interval, mean_interval, seed_interval

# pandas has no complete types
# pyright: standard

METRICS = ("hit@1", "hit@1 without layer 0", "recall", "MRR")
CELLS = ("cell hit@1", "role")
RANDOM, PRIOR = "random", "depth prior"


def ranking_metrics(values: Mapping[Component, float], planted: Sequence[Component]) -> dict[str, float]:
    """Compare the scores of components of one kind with the planted ones among them.

    hit@1: the highest is planted. Without layer 0: the same among the other layers, NaN where layer 0 is planted.
    recall: share of the planted ones among as many highest. MRR: 1 / rank of the highest planted one. All in [0, 1].
    Of components with the same score each has the worst rank that any of them could have: a tie is no hit.

    Raises:
        ValueError: a planted component without a score.
    """
    if missing := [str(component) for component in planted if component not in values]:
        raise ValueError(f"ranking: got no score for {missing[0]}, allowed: scores that hold every planted component")

    def ranks(among: Sequence[Component]) -> list[int]:
        by_component = dict(zip(among, rankdata([-values[c] for c in among], method="max"), strict=True))
        return [int(by_component[component]) for component in planted]

    everywhere = ranks(list(values))
    above = [component for component in values if component.layer > 0]
    inside = all(component in above for component in planted)
    return {
        "hit@1": float(min(everywhere) == 1),
        "hit@1 without layer 0": float(min(ranks(above)) == 1) if inside else nan,
        "recall": sum(rank <= len(planted) for rank in everywhere) / len(planted),
        "MRR": 1 / min(everywhere),
    }


def cell_metrics(
    scores: ComponentScores, planted: Sequence[Component], true_roles: Sequence[str], how: Reduction = "mean"
) -> dict[str, float]:
    """Compare the scores of single cells, a component at a token role, with the true ones.

    cell hit@1: of the components of the planted kind and all roles, the highest cell is a planted component at a true
    role; a tie is no hit. role: the planted components' own highest role is a true one. The role "subject" stands for
    every role of the subject. NaN where a localizer does not tell the last token from the subject.
    """
    if len(scores.roles) < 2:
        return dict.fromkeys(CELLS, nan)
    cells = np.stack([scores.at(role).reduced(how) for role in scores.roles], axis=1)
    true = {*true_roles, *(["subject"] if any(role.startswith("subject") for role in true_roles) else [])}
    kind = [i for i, component in enumerate(scores.components) if component.kind == planted[0].kind]
    own = [scores.components.index(component) for component in planted]
    best = np.argwhere(cells[kind] == cells[kind].max())
    found = [(scores.components[kind[i]], scores.roles[j]) for i, j in best]
    hit = len(found) == 1 and found[0][0] in planted and found[0][1] in true
    return {
        "cell hit@1": float(hit),
        "role": float(scores.roles[int(cells[own].sum(axis=0).argmax())] in true),
    }


def values_of_kind(scores: ComponentScores, kind: Kind, how: Reduction = "mean") -> dict[Component, float]:
    """The reduced scores of components of one kind: a localizer is asked which MLP (or attention sublayer) it is."""
    values = zip(scores.components, scores.reduced(how).tolist(), strict=True)
    return {component: value for component, value in values if component.kind == kind}


def random_metrics(n: int, planted: Sequence[Component]) -> dict[str, float]:
    """The same, in expectation, for a ranking of n components (one a layer) drawn at random."""
    k = len(planted)
    first = [comb(n - rank, k - 1) / comb(n, k) for rank in range(1, n - k + 2)]  # P(highest planted has this rank)
    inside = all(component.layer > 0 for component in planted)
    return {
        "hit@1": k / n,
        "hit@1 without layer 0": k / (n - 1) if inside else nan,
        "recall": k / n,
        "MRR": sum(p / rank for rank, p in enumerate(first, start=1)),
    }


def depth_prior(planted: Iterable[Sequence[Component]], n_layers: int) -> dict[Component, float]:
    """The best constant guess: how often each component was planted in the given models; of equals the lower layer.

    Give it development models alone: it is a baseline that knows how the ladder was made, not the model in question.
    """
    counts = Counter(component for components in planted for component in components)
    kinds: set[Kind] = {component.kind for component in counts}
    components = [Component(kind, layer) for kind in sorted(kinds) for layer in range(n_layers)]
    return {component: counts[component] - component.layer / (2 * n_layers) for component in components}


def interval_over_bases(means: Sequence[float] | np.ndarray) -> Interval:
    """95% interval of a mean over bases: Student's t over the bases' own means, cut to what the metric can be.

    Plants of one base share its weights and facts, so bases are what is drawn. Where all bases agree t has no width:
    there it is the interval for bounded values (`mean_interval`). One base has none (NaN).
    """
    values = np.asarray(means, dtype=float)
    if len(values) > 1 and np.ptp(values) == 0:
        return mean_interval(values)
    found, lowest = seed_interval(values), 0.0 if values.min() >= 0 else -1.0
    if not isfinite(found.lower):
        return found
    return Interval(value=found.value, lower=max(found.lower, lowest), upper=min(found.upper, 1.0), n=found.n)


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean of every metric by part, group (kind of plant, architecture, all) and localizer, with intervals over bases.

    Args:
        rows: one a (plant, localizer): part, base, plant, group, localizer, the metrics and, if there, those of
            `CELLS`; NaN: not scored.
    """
    both = pd.concat([rows, rows.assign(group="all")])
    if "architecture" in rows:
        both = pd.concat([both, rows.assign(group=rows["architecture"])])
    table = []
    keys = ["part", "group", "localizer"]
    for key, own in both.groupby(keys, sort=False):
        for metric in [name for name in (*METRICS, *CELLS) if name in own]:
            scored = own.dropna(subset=[metric])
            if len(scored):
                found = interval_over_bases(np.asarray(scored.groupby("base")[metric].mean()))
                table.append(
                    (*cast(tuple[str, ...], key), metric, found.value, found.lower, found.upper, found.n, len(scored))
                )
    columns = [*keys, "metric", "value", "lower", "upper", "n_bases", "n_plants"]
    return pd.DataFrame(table, columns=pd.Index(columns))


def differences(rows: pd.DataFrame, against: Sequence[str]) -> pd.DataFrame:
    """Every localizer minus each of some others, paired by plant, averaged over bases, with intervals.

    Only plants that both have scored count; names in `against` that are not among the rows are passed over.
    """
    table = []
    for metric in METRICS:
        wide = rows.pivot(index=["part", "base", "plant"], columns="localizer", values=metric)
        for other in (name for name in against if name in wide):
            for name in (name for name in wide if name != other):
                paired = (wide[name] - wide[other]).dropna()
                for part, own in paired.groupby("part"):
                    found = interval_over_bases(np.asarray(own.groupby("base").mean()))
                    table.append((part, name, other, metric, found.value, found.lower, found.upper, found.n, len(own)))
    columns = ["part", "localizer", "against", "metric", "difference", "lower", "upper", "n_bases", "n_plants"]
    return pd.DataFrame(table, columns=pd.Index(columns))
