"""AtP*: attribution patching with exact softmaxes for queries and keys, and without cancelling paths."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mechunlearn.activations import Change, Place, exact, hooked, last_logits, leaf
from mechunlearn.components import Component, ComponentScores
from mechunlearn.facts import Fact
from mechunlearn.localize import LOCALIZERS
from mechunlearn.localize.attention_record import AttentionRecord, head_effects, recorded_attention
from mechunlearn.localize.first_order import (
    SIGN,
    BatchScores,
    FirstOrderKind,
    assemble,
    by_role,
    difference,
    places_of,
    run,
    score_pairs,
)
from mechunlearn.localize.pairs import Donors, PairBatch
from mechunlearn.models import Model


@LOCALIZERS.register("atp_star", source="Kramár et al. 2024, arXiv:2403.00745")
def atp_star(
    model: Model,
    facts: Sequence[Fact],
    *,
    qk_fix: bool = True,
    grad_drop: bool = True,
    kinds: tuple[FirstOrderKind, ...] = ("mlp", "attention"),
    pairs_per_fact: Annotated[int, Field(ge=1)] = 1,
    donors: Donors = "other_answer",
    batch_size: Annotated[int, Field(ge=1)] = 32,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ComponentScores:
    """Attribution patching, repaired where saturated attention or paths that cancel hide an effect.

    qk_fix: a head's score is what its queries, its keys and its values do one by one: the softmax is computed anew
        with the clean query, or with one clean key, and only what follows the pattern is linearised; an attention
        sublayer's score is the sum over its heads. Without it the score is that of the head's or sublayer's output.
    grad_drop: for each layer, the gradient that passes through its attention and MLP is dropped, and the sizes of
        the resulting scores are averaged: score = 1 / (n_layers - 1) * sum over layers of |score without the layer|. A
        direct effect that an indirect one cancels shows in at least one of them.

    Sign and units: logits. With grad_drop sizes only, never negative; without it as `attribution_patching`.
    Cost: (n_layers + 2) backward-and-forward passes of one graph with grad_drop, 3 without.

    Raises:
        ValueError: no facts, no kinds, a fact that cannot be paired, grad_drop on a single layer.
        NotSupported: qk_fix in an architecture whose attention cannot be watched (GPT-Neo).

    Differs from the source: z is not a node beside q, k and v; tokens are aligned by role, and where two prompts differ
        in length a rotated query meets keys at other distances than in its own run.
    Source: Kramár et al. 2024, arXiv:2403.00745, sections 3.1 and 3.2.
    """
    if grad_drop and model.n_layers < 2:
        raise ValueError(
            "atp_star: option 'grad_drop': got a model of one layer, allowed: two or more; set it to false"
        )
    fixed = qk_fix and bool({"head", "attention"} & set(kinds))
    return score_pairs(
        model, facts, lambda batch, components: _scores(model, batch, components, fixed, grad_drop),
        method="atp_star", kinds=kinds, pairs_per_fact=pairs_per_fact, donors=donors, batch_size=batch_size,
        seed=seed,
        options={"qk_fix": fixed, "grad_drop": grad_drop},
        sign="logits, sizes only: with a layer's gradient dropped in turn" if grad_drop else SIGN,
    )  # fmt: skip


def _scores(
    model: Model, batch: PairBatch, components: Sequence[Component], fixed: bool, grad_drop: bool
) -> BatchScores:
    attended = [place for place in places_of(components) if fixed and place[0] in ("head", "attention")]
    places = [place for place in places_of(components) if place not in attended]
    layers = sorted({layer for _, layer in attended})
    with ExitStack() as stack:
        records = stack.enter_context(recorded_attention(model)) if fixed else AttentionRecord()
        clean = run(model, batch, batch.clean, places, gradient=False)
        before = records.take()
        dropped: list[int] = []
        gates = stack.enter_context(_gates(model, dropped)) if grad_drop else {}
        seen = stack.enter_context(hooked(model, record=places, change=gates, change_embedding=leaf))
        with torch.enable_grad():
            metric = batch.logit_diff(last_logits(model, batch.corrupt))
        after = records.take()
        inner = [tensor for layer in layers for tensor in (after[layer].pattern, after[layer].values)]
        wanted = [*(seen[place] for place in places), *inner]
        turns = range(model.n_layers) if grad_drop else range(1)
        total: dict[Place, Tensor] = {}
        for turn in turns:
            dropped[:] = [turn] if grad_drop else []
            found = torch.autograd.grad(metric.sum(), wanted, retain_graph=turn != turns[-1], allow_unused=True)
            found = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
            effects = {
                place: by_role(model, batch, place, exact(batch.take(gradient, batch.corrupt_positions))
                               * difference(batch, clean.activations[place], seen[place].detach()))
                for place, gradient in zip(places, found, strict=False)
            }  # fmt: skip
            for i, layer in enumerate(layers):
                pattern, values = found[len(places) + 2 * i : len(places) + 2 * i + 2]
                by_head = head_effects(batch, before[layer], after[layer], pattern, values)
                both: dict[Place, Tensor] = {
                    ("head", layer): by_head, ("attention", layer): by_head.sum(1, keepdim=True)
                }  # fmt: skip
                effects |= {place: effect for place, effect in both.items() if place in attended}
            for place, effect in effects.items():
                if grad_drop and place[1] == turn:  # a node's own layer: nothing but the node itself would be dropped
                    continue
                part = effect.abs() / (model.n_layers - 1) if grad_drop else effect
                total[place] = total[place] + part if place in total else part
    return assemble(components, total), clean.metric, metric.detach()


@contextmanager
def _gates(model: Model, dropped: list[int]) -> Iterator[dict[Place, Change]]:
    """Changes that let every write through and stop the gradient into the sublayers of the dropped layer."""

    def gate(layer: int) -> Change:
        def change(value: Tensor) -> Tensor:
            passed = value.view_as(value)  # what is recorded is after the gate: its own gradient is whole
            if value.requires_grad:
                value.register_hook(lambda g: torch.zeros_like(g) if layer in dropped else g)
            return passed

        return change

    yield {(kind, layer): gate(layer) for layer in range(model.n_layers) for kind in ("mlp", "attention")}
