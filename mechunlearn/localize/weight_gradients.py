"""Every fact's own gradient of the weights, summed up by component; what the weight-based localizers share.

One forward and one activation-only backward pass give a projection's input x and its output's gradient g for all
facts of a batch; the gradient of the weight for one fact is then G = g^T x. Sums of squares of G over an output's or
an input's weights need no G: row i has g_i^T (x x^T) g_i, column j has x_j^T (g g^T) x_j. For n tokens that is
n^2 (d_in + d_out) multiplications in place of n d_in d_out, and no memory for gradients per fact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechunlearn.activations import exact, hooked, last_logits, leaf, pad, untouched
from mechunlearn.components import Component, ComponentScores, Kind
from mechunlearn.facts import Fact, hash_facts
from mechunlearn.localize.kinds import components_of
from mechunlearn.localize.pairs import batches, build_pairs
from mechunlearn.models import Model, component_parameters, is_transposed, oriented
from mechunlearn.prompts import encode, encode_answers, render

Entry = Literal["squared", "absolute", "saliency"]
"""What is summed over a component's weights w with gradients g: g^2, |g| or |w g|."""
WeightMetric = Literal["logit_diff", "log_prob"]
"""logit(true) - logit(a wrong answer) where they first differ, or log P(the whole true answer), after the prompt."""
Normalize = Literal["mean", "sum"]
Side = Literal["outputs", "inputs", "bias"]


def weight_scores(
    model: Model,
    facts: Sequence[Fact],
    entry: Entry,
    *,
    method: str,
    sign: str,
    kinds: Sequence[Kind],
    metric: WeightMetric,
    normalize: Normalize,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> ComponentScores:
    """`weight_sums` as scores without token roles, for weights are shared by all tokens.

    Args:
        options: the method's own, for the record.

    Raises:
        ValueError: no facts, no kinds, or for "logit_diff" a fact without a wrong answer to compare with.
    """
    components = components_of(model, method, kinds)
    sums = weight_sums(
        model, facts, components, entry, metric=metric, normalize=normalize, batch_size=batch_size, seed=seed
    )
    return ComponentScores(
        method=method,
        metric=metric,
        sign=sign,
        components=components,
        roles=("all",),
        per_fact=sums[:, :, None],
        options={**(options or {}), "kinds": list(kinds), "metric": metric, "normalize": normalize,
                 "batch_size": batch_size, "seed": seed},
        facts_sha256=hash_facts(facts),
    )  # fmt: skip


def weight_sums(
    model: Model,
    facts: Sequence[Fact],
    components: Sequence[Component],
    entry: Entry,
    *,
    metric: WeightMetric,
    normalize: Normalize,
    batch_size: int,
    seed: int,
) -> Float[np.ndarray, "fact component"]:
    """Sum (or mean) over each component's weights and biases of g^2, |g| or |w g|, g = d metric / d w of one fact.

    Which weights a component has is in `models.component_parameters`; norms belong to none, and heads that share keys
    and values each count the shared ones.

    Raises:
        ValueError: no facts, or for "logit_diff" a fact without a wrong answer to compare with.
    """
    plan, sizes = _plan(model, components)
    weights = dict(model.hf.named_parameters())
    total = np.zeros((len(facts), len(components)))
    with untouched(model):
        for rows, measure in measured(model, facts, metric, batch_size, seed):
            found = torch.zeros(len(rows), len(components), dtype=torch.float64, device=model.device)
            for path, (x, g) in inputs_and_gradients(model, tuple(plan), measure).items():
                sides = plan[path]
                for side, (component, unit) in sides.items():
                    name = f"{path}.bias" if side == "bias" else f"{path}.weight"
                    sums = _unit_sums(x, g, oriented(model, name, weights[name]), side, entry)
                    found.index_add_(1, component, sums.double()[:, unit])
            total[rows] = found.cpu().numpy()
    return total / sizes if normalize == "mean" else total


@dataclass(frozen=True, kw_only=True)
class _Units:
    """Which output, input or bias entries of one projection go to which component."""

    component: list[int]
    unit: list[int]


def _plan(
    model: Model, components: Sequence[Component]
) -> tuple[dict[str, dict[Side, tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]], Float[np.ndarray, " component"]]:
    """By path of a projection, the units to add up and the components to add them to; and how many weights each has."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.hf.named_parameters()}
    listed: dict[str, dict[Side, _Units]] = {}
    sizes = np.zeros(len(components))
    for index, component in enumerate(components):
        for name, mask in component_parameters(model, component).items():
            path, _, leaf = name.rpartition(".")
            outputs = 1 if leaf == "weight" and is_transposed(model, name) else 0
            # masks are of whole outputs or whole inputs; one of everything is taken output by output
            axis = next((axis for axis, n in enumerate(mask.shape) if n > 1), outputs)
            side: Side = "bias" if leaf == "bias" else "outputs" if axis == outputs else "inputs"
            units = mask.reshape(-1).expand(shapes[name][axis]).nonzero().flatten().tolist()
            into = listed.setdefault(path, {}).setdefault(side, _Units(component=[], unit=[]))
            into.component.extend([index] * len(units))
            into.unit.extend(units)
            sizes[index] += len(units) * np.prod(shapes[name]) / shapes[name][axis]

    def on_device(units: _Units) -> tuple[Tensor, Tensor]:
        return torch.tensor(units.component, device=model.device), torch.tensor(units.unit, device=model.device)

    return {path: {side: on_device(u) for side, u in sides.items()} for path, sides in listed.items()}, sizes


def inputs_and_gradients(
    model: Model, paths: Sequence[str], measure: Callable[[], Float[Tensor, " batch"]]
) -> dict[str, tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_out"]]]:
    """What enters each projection, and the gradient of each fact's metric at what leaves it."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[path], outputs[path] = given[0].detach(), output

        return hook

    with ExitStack() as handles, torch.enable_grad(), hooked(model, change_embedding=leaf):
        for path in paths:
            handles.callback(model.hf.get_submodule(path).register_forward_hook(keep(path)).remove)
        # each fact's metric depends on its own activations alone, so one backward of the sum serves all
        found = torch.autograd.grad(measure().sum(), [outputs[path] for path in paths])
    return {path: (exact(inputs[path]), exact(g)) for path, g in zip(paths, found, strict=True)}


def _unit_sums(
    x: Float[Tensor, "batch pos d_in"], g: Float[Tensor, "batch pos d_out"], weight: Tensor, side: Side, entry: Entry
) -> Float[Tensor, "batch unit"]:
    """For each fact the sum over the weights of every output, or input, or (bias) of every output its one."""
    if side == "bias":
        bias = g.sum(dim=1)
        return bias.square() if entry == "squared" else (bias * weight).abs() if entry == "saliency" else bias.abs()
    own, other = (g, x) if side == "outputs" else (x, g)
    if entry == "squared":
        return torch.einsum("bpu,bpu->bu", (other @ other.mT) @ own, own).clamp(min=0)
    weight = weight if side == "outputs" else weight.T
    sums = []
    for mine, theirs in zip(own, other, strict=True):  # one fact at a time: a gradient is as large as the weight
        gradient = mine.T @ theirs
        sums.append((gradient * weight if entry == "saliency" else gradient).abs().sum(dim=1))
    return torch.stack(sums)


def measured(
    model: Model, facts: Sequence[Fact], metric: WeightMetric, batch_size: int, seed: int
) -> Iterator[tuple[list[int], Callable[[], Float[Tensor, " batch"]]]]:
    """Batches of facts, by index, and what computes their metric."""
    if metric == "logit_diff":
        for batch in batches(model, build_pairs(model, facts, seed=seed), batch_size):
            yield (
                [pair.fact for pair in batch.pairs],
                lambda batch=batch: batch.logit_diff(last_logits(model, batch.clean)),
            )
        return
    if not facts:
        raise ValueError("localizer: got no facts, allowed: at least one")
    prompts = encode(model, [render(fact, "prompt") for fact in facts])
    answers = encode_answers(model, [fact.target_true for fact in facts])
    texts = [(prompt, answers[fact.target_true]) for prompt, fact in zip(prompts, facts, strict=True)]
    order = sorted(range(len(facts)), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, lambda rows=rows: _log_prob(model, [texts[i] for i in rows])


def _log_prob(model: Model, texts: Sequence[tuple[list[int], tuple[int, ...]]]) -> Float[Tensor, " batch"]:
    """Log P(answer | prompt), summed over the answer's tokens."""
    tokens = pad(model, [[*prompt, *answer[:-1]] for prompt, answer in texts])
    first = min(len(prompt) for prompt, _ in texts) - 1
    kept = torch.arange(first, tokens.ids.shape[1], device=model.device)
    mask = None if bool(tokens.mask.all()) else tokens.mask.long()
    output = model.hf(input_ids=tokens.ids, attention_mask=mask, use_cache=False, logits_to_keep=kept)
    at = [
        (row, len(prompt) - 1 - first + i, token)
        for row, (prompt, answer) in enumerate(texts)
        for i, token in enumerate(answer)
    ]
    row, position, token = torch.tensor(at, device=model.device).T
    log_p = exact(output.logits).log_softmax(dim=-1)[row, position, token]
    return log_p.new_zeros(len(texts)).index_add(0, row, log_p)
