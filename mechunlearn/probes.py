"""Linear probes: what can be read off the residual stream, on entities the probe has never seen, and in how many bits.

Features are standardised on the training rows, so that the solver converges and one regularization fits all layers.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from mechunlearn.activations import hooked, last_logits, pad, stream_places, streams, untouched
from mechunlearn.facts import Fact
from mechunlearn.models import Model
from mechunlearn.prompts import render, token_roles

Site = Literal["subject_last", "subject_mean", "last"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A multinomial logistic regression on standardised features."""

    classes: tuple[str, ...]
    mean: Float[np.ndarray, " d_feature"]
    scale: Float[np.ndarray, " d_feature"]
    weight: Float[np.ndarray, "answer d_feature"]
    bias: Float[np.ndarray, " answer"]

    def probabilities(self, features: Float[np.ndarray, "row d_feature"]) -> Float[np.ndarray, "row answer"]:
        """Probability of every class, columns in the order of `classes`."""
        logits = ((features - self.mean) / self.scale) @ self.weight.T + self.bias
        logits = np.exp(logits - logits.max(axis=1, keepdims=True))
        return logits / logits.sum(axis=1, keepdims=True)

    def predict(self, features: Float[np.ndarray, "row d_feature"]) -> tuple[str, ...]:
        """The most probable class of every row."""
        return tuple(self.classes[i] for i in self.probabilities(features).argmax(axis=1))


def fit_probe(
    features: Float[np.ndarray, "row d_feature"],
    labels: Sequence[str],
    *,
    regularization: float = 10.0,
    standardize: bool = True,
    max_steps: int = 1000,
    seed: int = 0,
) -> Probe:
    """Fit a multinomial logistic regression; deterministic, so the seed only fixes sklearn's own.

    Minimises sum_i -log p(label_i) + regularization / 2 * ||weight||^2 (the bias is free).

    Args:
        regularization: in nats per squared weight on standardised features; sklearn's 1 / C.
        standardize: False leaves the features as they are (counts of tokens).

    Raises:
        ValueError: fewer than two classes, or features and labels that do not match.
    """
    if len(features) != len(labels) or not regularization > 0:
        raise ValueError(
            f"probe: got {len(features)} feature rows, {len(labels)} labels, regularization {regularization}, "
            "allowed: as many rows as labels, regularization above 0"
        )
    if len(set(labels)) < 2:
        raise ValueError(f"probe: got {len(set(labels))} class, allowed: at least 2; give facts with different answers")
    features = np.asarray(features, dtype=np.float64)
    mean, scale = np.zeros(features.shape[1]), np.ones(features.shape[1])
    if standardize:
        mean, scale = features.mean(axis=0), features.std(axis=0)
        # a constant feature carries nothing; dividing by its rounding error would make it carry noise
        scale[scale <= 1e-6 * np.abs(mean) + 1e-12] = 1.0
    solver = LogisticRegression(C=1 / regularization, max_iter=max_steps, random_state=seed)
    # matrices this small lose a factor of ten to BLAS threads waiting for each other
    with warnings.catch_warnings(), threadpool_limits(1):
        # stopping early only regularises a little more; a probe that does not fit is caught by its accuracy
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # few rows, as an online code starts with
        solver.fit((features - mean) / scale, np.asarray(labels))
    weight, bias = solver.coef_, np.asarray(solver.intercept_)
    if len(weight) == 1:  # sklearn keeps one row for two classes: logit(1) - logit(0)
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return Probe(classes=tuple(str(c) for c in solver.classes_), mean=mean, scale=scale, weight=weight, bias=bias)


def entity_folds(
    labels: Sequence[str], groups: Sequence[str], *, folds: int = 5, seed: int = 0
) -> Int[np.ndarray, " row"]:
    """Deal whole groups (entities) to folds, answer by answer, so that no group is in two and classes are balanced.

    Raises:
        ValueError: fewer than two folds, fewer groups than folds, or a class that fewer than two groups have.
    """
    label_of = dict(zip(reversed(groups), reversed(labels), strict=True))
    if folds < 2 or len(label_of) < folds:
        raise ValueError(f"probe: got {len(label_of)} subjects for {folds} folds, allowed: 2 <= folds <= subjects")
    members: dict[str, list[str]] = {}
    for group in sorted(label_of):
        members.setdefault(label_of[group], []).append(group)
    if rare := [label for label, names in members.items() if len(names) < 2]:
        raise ValueError(
            f"probe: answer {rare[0]!r} ({len(rare)} answers in all) has a single subject, allowed: at least 2 per "
            "answer, so that one can be held out; give more facts or leave these out"
        )
    rng = np.random.default_rng(seed)
    order = [names[i] for _, names in sorted(members.items()) for i in rng.permutation(len(names))]
    fold_of = {group: i % folds for i, group in enumerate(order)}
    return np.array([fold_of[group] for group in groups])


def held_out_probabilities(
    features: Float[np.ndarray, "row d_feature"],
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    folds: int = 5,
    regularization: float = 10.0,
    standardize: bool = True,
    seed: int = 0,
) -> Float[np.ndarray, "row answer"]:
    """Probability of every class for every row, from a probe that saw no row of the same group.

    Columns follow sorted(set(labels)); a class missing from a training part gets probability 0 there.

    Raises:
        ValueError: too few groups per class for the folds, see `entity_folds`.
    """
    fold = entity_folds(labels, groups, folds=folds, seed=seed)
    classes = sorted(set(labels))
    result = np.zeros((len(labels), len(classes)))
    for held_out in range(folds):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        result[test] = _over_classes(
            features, labels, classes, train, test, regularization=regularization, standardize=standardize, seed=seed
        )
    return result


def _over_classes(
    features: np.ndarray, labels: Sequence[str], classes: list[str], train: np.ndarray, test: np.ndarray, **options: Any
) -> Float[np.ndarray, "row answer"]:  # fmt: skip
    """Class probabilities of the test rows from a probe on the training rows; a class not seen there gets 0."""
    seen = [str(labels[i]) for i in train]
    result = np.zeros((len(test), len(classes)))
    if len(set(seen)) == 1:  # nothing to fit
        result[:, classes.index(seen[0])] = 1
        return result
    probe = fit_probe(features[train], seen, **options)
    result[:, [classes.index(label) for label in probe.classes]] = probe.probabilities(features[test])
    return result


def is_correct(probabilities: Float[np.ndarray, "row answer"], labels: Sequence[str]) -> Float[np.ndarray, " row"]:
    """1.0 where the most probable of the sorted classes is the label, else 0.0."""
    best = np.array(sorted(set(labels)))[probabilities.argmax(axis=1)]
    return (best == np.array(labels)).astype(float)


def shuffled_labels(labels: Sequence[str], groups: Sequence[str], *, seed: int = 0) -> tuple[str, ...]:
    """Control labels: the labels of the groups, permuted over the groups; all rows of a group share one."""
    label_of = dict(zip(reversed(groups), reversed(labels), strict=True))
    names = sorted(label_of)
    order = np.random.default_rng(seed).permutation(len(names))
    control = {name: label_of[names[i]] for name, i in zip(names, order, strict=True)}
    return tuple(control[group] for group in groups)


@dataclass(frozen=True, kw_only=True)
class CodeLength:
    """Bits to send labels to somebody who has the features, block by block, and the same for control labels."""

    n_classes: int
    rows: tuple[int, ...]
    """Rows of each block; the first is sent at log2(n_classes) bits a row."""
    bits: tuple[float, ...]
    control_bits: tuple[float, ...]
    """Of labels permuted over entities: what the answers' frequencies and the probe's capacity alone compress."""

    @property
    def uniform_bits(self) -> float:
        """The length without features: n log2 K."""
        return sum(self.rows) * math.log2(self.n_classes)

    @property
    def compression(self) -> float:
        """How many times shorter than without features: kappa = n log2 K / L; 1 or less is nothing readable."""
        return self.uniform_bits / sum(self.bits)

    @property
    def control_compression(self) -> float:
        """The same of the control labels."""
        return self.uniform_bits / sum(self.control_bits)

    @property
    def selectivity(self) -> float:
        """Compression minus the control's: about 0 where the features say nothing about the labels."""
        return self.compression - self.control_compression


def online_code(
    features: Float[np.ndarray, "row d_feature"],
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    fractions: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1.0),
    regularization: float = 10.0,
    max_steps: int = 1000,
    seed: int = 0,
) -> CodeLength:
    """Online (prequential) code length of labels given features: how easily they are read, not only whether.

    L = t_1 log2 K - sum over blocks i > 1 of log2 p_i(labels of block i | features), with p_i a probe fitted on the t
    rows of all blocks before, as if every class had been met once more: p_i = (t probe + 1) / (t + K), so that an
    answer not met yet can be sent. Entities come in a seeded order that does not look at labels, and no two blocks
    share one. It is a code: 2^-L sums to 1 over all labellings.

    Sign and units: bits, above 0; fewer is easier to read. More rows compress better: compare equal rows only.

    Args:
        classes: every answer that may occur, known to sender and receiver; None takes those of `labels`.
        fractions: rising shares of the entities at which blocks end; the last is 1. Empty blocks are left out.
        regularization: of the probes, see `fit_probe`.
        max_steps: of their solver.
        seed: of the order, and of the control labels.

    Raises:
        ValueError: no rows or rows that do not match, fewer than two classes or a label not among them, fractions that
            do not rise to 1.

    Differs from the source: few, coarse blocks, for there are hundreds of facts and not 100,000; smoothed as above.
    Source: Voita & Titov 2020, arXiv:2003.12298, section 2.2.2; control labels: Hewitt & Liang 2019, arXiv:1909.03368.
    """
    known = tuple(dict.fromkeys(labels if classes is None else classes))

    def sent(own: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return online_bits(
            features, own, groups, classes=known, fractions=fractions, regularization=regularization,
            max_steps=max_steps, seed=seed,
        )  # fmt: skip

    bits, block = sent(labels)
    control, _ = sent(shuffled_labels(labels, groups, seed=seed + 1))
    return CodeLength(
        n_classes=len(known),
        rows=tuple(np.bincount(block).tolist()),
        bits=tuple(np.bincount(block, bits).tolist()),
        control_bits=tuple(np.bincount(block, control).tolist()),
    )


def online_bits(
    features: Float[np.ndarray, "row d_feature"],
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    fractions: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1.0),
    regularization: float = 10.0,
    standardize: bool = True,
    max_steps: int = 1000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Bits that each row's label costs in the code of `online_code`, and the block in which the row is sent.

    Raises:
        ValueError: as `online_code`.
    """
    known = sorted(set(labels if classes is None else classes))
    if not 0 < len(features) == len(labels) == len(groups) or len(known) < 2 or not set(labels) <= set(known):
        raise ValueError(
            f"online code: got {len(features)} feature rows, {len(labels)} labels, {len(groups)} groups, {len(known)} "
            "classes, allowed: as many of each, at least 1 row and 2 classes, every label among the classes"
        )
    if list(fractions) != sorted({*fractions, 1.0}) or not fractions[0] > 0:
        raise ValueError(f"online code: got fractions {tuple(fractions)}, allowed: rising, above 0, the last one 1")
    entities = {name: i for i, name in enumerate(sorted(set(groups)))}
    order = np.random.default_rng(seed).permutation(len(entities))
    ends = np.unique(np.ceil(np.array(fractions) * len(entities)))
    block = np.searchsorted(ends, order[[entities[group] for group in groups]], side="right")
    fit = {"regularization": regularization, "standardize": standardize, "max_steps": max_steps, "seed": seed}
    bits = np.zeros(len(labels))
    for at in range(len(ends)):
        sent, past = np.flatnonzero(block == at), np.flatnonzero(block < at)
        p = np.ones((len(sent), len(known)))
        if len(past):
            p += len(past) * _over_classes(features, labels, known, past, sent, **fit)
        column = [known.index(labels[i]) for i in sent.tolist()]
        bits[sent] = -np.log2(p[np.arange(len(sent)), column] / (len(past) + len(known)))
    return bits, block


def residual_features(
    model: Model,
    facts: Sequence[Fact],
    form: str = "prompt",
    sites: Sequence[Site] = ("subject_last", "last"),
    *,
    mid: bool = False,
    batch_size: int = 64,
) -> dict[Site, Float[np.ndarray, "fact layer d_model"]]:
    """The residual stream of every fact's prompt at the sites: one forward pass, changes nothing.

    Layer 0 is the stream before the first block (the embeddings), layer l + 1 the stream after block l; float32. With
    `mid`, 2 l + 1 is the stream between attention and MLP of block l, and 2 l + 2 the one after the block.

    Args:
        form: how the facts are asked, see `prompts.forms`.
        sites: the subject's last token, the mean over its tokens, or the prompt's last token.

    Raises:
        ValueError: no facts or an unknown site.
        NotSupported: `mid`, where blocks are parallel.
    """
    if not facts or not set(sites) <= set(get_args(Site)):
        raise ValueError(f"features: got {len(facts)} facts, sites {list(sites)}, allowed: {', '.join(get_args(Site))}")
    texts = [token_roles(model, render(fact, form), fact.subject) for fact in facts]
    spans = [_span(roles) for _, roles in texts]
    shape = (len(facts), (2 if mid else 1) * model.n_layers + 1, model.d_model)
    result: dict[Site, np.ndarray] = {site: np.zeros(shape, dtype=np.float32) for site in sites}
    order = sorted(range(len(facts)), key=lambda i: len(texts[i][0]))
    with untouched(model), torch.no_grad():
        for rows in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            tokens = pad(model, [texts[i][0] for i in rows])
            with hooked(model, record=stream_places(model, mid=mid)) as seen:
                last_logits(model, tokens)
            for site in sites:
                weights = torch.zeros(tokens.ids.shape, device=model.device)
                for row, i in enumerate(rows):
                    first, end = {"subject_last": (spans[i][1] - 1, spans[i][1]), "subject_mean": spans[i]}.get(
                        site, (len(texts[i][0]) - 1, len(texts[i][0]))
                    )
                    weights[row, first:end] = 1 / (end - first)
                for layer, stream in enumerate(streams(model, seen, mid=mid)):
                    result[site][rows, layer] = torch.einsum("bp,bpd->bd", weights, stream.float()).cpu().numpy()
    return result


def subject_token_counts(model: Model, facts: Sequence[Fact], form: str = "prompt") -> Float[np.ndarray, "row token"]:
    """How often each token occurs in the subject: all that a probe could know from the name alone."""
    names = []
    for fact in facts:
        ids, roles = token_roles(model, render(fact, form), fact.subject)
        names.append(ids[slice(*_span(roles))])
    columns = {token: i for i, token in enumerate(sorted({token for name in names for token in name}))}
    counts = np.zeros((len(facts), len(columns)), dtype=np.float32)
    for row, name in enumerate(names):
        for token in name:
            counts[row, columns[token]] += 1
    return counts


def _span(roles: Sequence[str]) -> tuple[int, int]:
    """First position of the subject and the one after its last."""
    inside = [i for i, role in enumerate(roles) if role.startswith("subject")]
    return inside[0], inside[-1] + 1
