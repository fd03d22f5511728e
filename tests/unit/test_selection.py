"""Entries, rows and columns by score, and exactly equal budgets: counts, order, ties, and what rows are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mechunlearn.components import Component, ComponentScores
from mechunlearn.edit.training import substituted
from mechunlearn.localize.entry_scores import entry_scores
from mechunlearn.localize.weight_gradients import weight_sums
from mechunlearn.masks import ParameterMask, mask_of, n_localizable, n_shared
from mechunlearn.models import Model, all_components, component_parameters, oriented
from mechunlearn.selection import select_entries, select_exactly

KINDS = ("mlp", "attention", "head", "neuron")


def drawn_scores(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """A positive score for every entry of attention and MLP."""
    generator = torch.Generator().manual_seed(seed)
    shapes = mask_of(model, all_components(model)).shapes
    return {name: torch.rand(shape, generator=generator) + 0.01 for name, shape in shapes.items()}


def n_true(mask: ParameterMask) -> int:
    return sum(int(mask.full(name).sum()) for name in mask.entries)


def is_in(mask: ParameterMask, name: str, like: torch.Tensor) -> torch.Tensor:
    return mask.full(name) if name in mask.entries else torch.zeros_like(like, dtype=torch.bool)


@pytest.mark.parametrize("budget", [1, 777, 0.1, 1.0])
def test_entries_fill_the_budget_exactly_with_the_best(any_model: Model, budget: float) -> None:
    scores = drawn_scores(any_model)
    mask = select_entries(any_model, scores, budget=budget)
    limit = budget if isinstance(budget, int) else int(budget * n_localizable(any_model) + 1e-6)
    assert mask.n_selected == n_true(mask) == limit
    inside = torch.cat([scores[name][is_in(mask, name, scores[name])] for name in scores])
    outside = torch.cat([scores[name][~is_in(mask, name, scores[name])] for name in scores])
    assert not len(outside) or inside.min() >= outside.max()


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_lines_are_the_longest_prefix_by_mean_score_and_cost_one_bool_each(any_model: Model, granularity: str) -> None:
    scores = drawn_scores(any_model)
    if granularity == "row":
        scores = {name: score for name, score in scores.items() if score.ndim == 2}  # of weights alone
    limit = n_localizable(any_model) // 5
    mask = select_entries(any_model, scores, budget=limit, granularity=granularity)
    lines = []
    for name, score in scores.items():
        if score.ndim == 2:
            view = oriented(any_model, name, score.double())
            view = view if granularity == "row" else view.T
            taken = oriented(any_model, name, is_in(mask, name, score))
            taken = taken if granularity == "row" else taken.T
            assert (taken.all(1) == taken.any(1)).all()
            assert name not in mask.entries or mask.entries[name].numel() == len(view)
            lines += [(-float(line.mean()), len(line), bool(t[0])) for line, t in zip(view, taken, strict=True)]
        else:
            assert name not in mask.entries  # a bias is no column
    lines.sort(key=lambda line: line[0])
    n = sum(taken for *_, taken in lines)
    assert all(taken for *_, taken in lines[:n])
    assert mask.n_selected == n_true(mask) == sum(cost for _, cost, _ in lines[:n]) <= limit
    assert sum(cost for _, cost, _ in lines[: n + 1]) > limit


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_a_row_makes_one_output_of_the_projection_with_its_bias(
    tiny_model: Callable[..., Model], architecture: str
) -> None:
    model = tiny_model(architecture)
    scores = drawn_scores(model)
    name = next(name for name in scores if "mlp" in name and name.endswith("weight"))
    path = name.removesuffix(".weight")
    chosen = {n: scores[n] for n in (name, f"{path}.bias") if n in scores}
    with torch.no_grad():
        oriented(model, name, chosen[name])[7] += 10
    has_bias = f"{path}.bias" in chosen
    size = oriented(model, name, chosen[name]).shape[1] + has_bias
    mask = select_entries(model, chosen, budget=size, granularity="row")
    assert mask.n_selected == size
    x = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(1))
    module, parameters = model.hf.get_submodule(path), dict(model.hf.named_parameters())
    before = module(x)
    with substituted(model, {n: parameters[n].detach() + mask.full(n) for n in mask.entries}):
        moved = (module(x) - before).detach()
    assert torch.equal(moved.abs().sum(0).nonzero().flatten(), torch.tensor([7]))
    torch.testing.assert_close(moved[:, 7], x.sum(-1) + has_bias)


def test_a_column_is_what_one_input_is_multiplied_by(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("gpt2")
    scores = drawn_scores(model)
    name = "transformer.h.1.mlp.c_proj.weight"
    with torch.no_grad():
        scores[name][5] += 10  # Conv1D keeps [in out]
    mask = select_entries(model, {name: scores[name]}, budget=model.d_model, granularity="column")
    assert torch.equal(mask.entries[name], (torch.arange(model.d_mlp) == 5)[:, None])


def test_selection_within_a_mask_stays_within_it(any_model: Model) -> None:
    within = mask_of(any_model, [Component("head", 1, 0), Component("neuron", 2, 3), Component("mlp", 0)])
    scores = drawn_scores(any_model)
    for granularity in ("entry", "row", "column"):
        mask = select_entries(any_model, scores, budget=1000, within=within, granularity=granularity)
        assert n_shared(mask, within) == mask.n_selected == n_true(mask)
        assert (mask.n_selected == 1000) if granularity == "entry" else (0 < mask.n_selected <= 1000)
    everything = select_entries(any_model, scores, budget=10**9, within=within)
    assert everything.n_selected == within.n_selected


def test_ties_go_by_the_models_order_and_output_by_output(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("gpt2")
    shapes = mask_of(model, all_components(model)).shapes
    scores = {name: torch.ones(shape) for name, shape in reversed(shapes.items())}
    first = "transformer.h.0.attn.c_attn.weight"  # the first of the model, kept as [in out]
    mask = select_entries(model, scores, budget=model.d_model + 3)
    expected = torch.zeros(shapes[first], dtype=torch.bool)
    expected[:, 0] = True
    expected[:3, 1] = True
    assert tuple(mask.entries) == (first,)
    assert torch.equal(mask.full(first), expected)
    rows = select_entries(model, scores, budget=2 * (model.d_model + 1), granularity="row")
    assert torch.equal(rows.full(first)[0].nonzero().flatten(), torch.tensor([0, 1]))
    assert int(rows.full("transformer.h.0.attn.c_attn.bias").sum()) == 2


def test_only_positive_scores_are_selected(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj.weight"
    score = -torch.ones(model.d_mlp, model.d_model)
    score[3, :4] = 0.5
    assert select_entries(model, {name: score}, budget=0.5).n_selected == 4
    for granularity in ("entry", "row", "column"):
        with pytest.raises(ValueError, match="entry scores: no"):
            select_entries(model, {name: -score.abs()}, budget=0.5, granularity=granularity)


def test_scores_that_do_not_fit_are_refused(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj.weight"
    ones = torch.ones(model.d_mlp, model.d_model)
    for scores, message in (
        ({"model.norm.weight": torch.ones(model.d_model)}, "got 'model.norm.weight', allowed: weights and biases"),
        ({name: ones.T}, r"got shape \(32, 48\), allowed: \(48, 32\)"),
        ({name: ones * torch.nan}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            select_entries(model, scores, budget=0.5)
    with pytest.raises(ValueError, match="the best row alone has 32; raise the budget"):
        select_entries(model, {name: ones}, budget=31, granularity="row")
    with pytest.raises(ValueError, match="granularity: got 'rows'"):
        select_entries(model, {name: ones}, budget=31, granularity="rows")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("entry", ["squared", "absolute", "saliency"])
def test_entry_scores_add_up_to_those_of_components(any_model: Model, tiny_facts, entry: str) -> None:
    any_model.hf.double()
    facts = tiny_facts.of("colour").facts[:3]
    components = all_components(any_model, KINDS)
    scores = entry_scores(any_model, facts, entry, batch_size=2)
    expected = weight_sums(
        any_model, facts, components, entry, metric="log_prob", normalize="sum", batch_size=2, seed=0
    ).mean(0)
    sums = [
        sum(float(scores[n][m.expand(scores[n].shape)].sum()) for n, m in component_parameters(any_model, c).items())
        for c in components
    ]
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-12)
    head = entry_scores(any_model, facts, entry, components=[Component("head", 1, 1)])
    for name, mask in component_parameters(any_model, Component("head", 1, 1)).items():
        assert not head[name][~mask.expand(head[name].shape)].any()
        assert head[name].any()


def ranked(components: tuple[Component, ...], seed: int = 0) -> ComponentScores:
    values = np.random.default_rng(seed).normal(size=(1, len(components), 1))
    return ComponentScores(method="test", metric="m", sign="s", components=components, roles=("last",), per_fact=values)


@pytest.mark.parametrize("kinds", [("mlp",), ("attention",), ("mlp", "attention"), ("head",), ("neuron",), KINDS])
def test_exact_selections_are_exact_and_grow(any_model: Model, kinds: tuple) -> None:
    scores = ranked(all_components(any_model, kinds))
    total = mask_of(any_model, all_components(any_model, kinds)).n_selected
    smaller = None
    for n in (1, 33, 1000, total // 2, total - 1, total):
        mask = select_exactly(scores, any_model, n_entries=n, kinds=kinds)
        assert mask.n_selected == n_true(mask) == n
        assert smaller is None or n_shared(smaller, mask) == smaller.n_selected
        smaller = mask
    with pytest.raises(ValueError, match=f"got {total + 1} entries, allowed: 1 to {total}, as many as"):
        select_exactly(scores, any_model, n_entries=total + 1, kinds=kinds)
    with pytest.raises(ValueError, match="exact selection: got 0"):
        select_exactly(scores, any_model, n_entries=0, kinds=kinds)


def test_the_last_component_is_cut_by_neurons_and_then_by_entries(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("llama")
    components = all_components(model, ("mlp",))
    best, second, _ = ranked(components).ranking()
    neuron = 3 * model.d_model
    n = mask_of(model, [best]).n_selected + 2 * neuron + 5
    mask = select_exactly(ranked(components), model, n_entries=n)
    assert mask.components == tuple(
        sorted((best, Component("neuron", second.layer, 0), Component("neuron", second.layer, 1)),
               key=lambda c: (c.layer, c.kind, c.index or 0))
    )  # fmt: skip
    assert mask.parts == (f"{second}.gate (in part)",)
    gate = mask.full(f"model.layers.{second.layer}.mlp.gate_proj.weight")
    assert gate[:2].all()
    assert torch.equal(gate[2], torch.arange(model.d_model) < 5)
    assert not gate[3:].any()


def test_scored_neurons_and_heads_of_the_cut_component_go_by_their_scores(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("llama")
    components = all_components(model, ("mlp", "neuron", "attention", "head"))
    scores = ranked(components)
    for kind, unit in (("mlp", "neuron"), ("attention", "head")):
        best = next(c for c in scores.ranking() if c.kind == kind)
        units = [c for c in scores.ranking() if c.kind == unit and c.layer == best.layer]
        size = mask_of(model, units[:2]).n_selected
        mask = select_exactly(scores, model, n_entries=size, kinds=(kind,))
        assert set(mask.components) == set(units[:2])


def test_the_bias_that_no_head_has_comes_last(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("gpt2")
    scores = ranked(all_components(model, ("attention",)))
    best = scores.ranking()[0]
    whole = mask_of(model, [best]).n_selected
    mask = select_exactly(scores, model, n_entries=whole - 2, kinds=("attention",))
    assert len(mask.components) == model.n_heads
    assert mask.parts == (f"{best}.o (in part)",)
    bias = mask.full(f"transformer.h.{best.layer}.attn.c_proj.bias")
    assert torch.equal(bias, torch.arange(model.d_model) < model.d_model - 2)
