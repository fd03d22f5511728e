from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mechunlearn.components import Component, ComponentScores
from mechunlearn.masks import ParameterMask, mask_of, n_localizable, random_mask_like, select_components
from mechunlearn.models import Model, all_components, component_parameters


def brute_force(model: Model, components: tuple[Component, ...]) -> dict[str, torch.Tensor]:
    full = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.hf.named_parameters()}
    for component in components:
        for name, mask in component_parameters(model, component).items():
            full[name] |= mask.expand(full[name].shape)
    return full


def scored(components: tuple[Component, ...], values: list[float]) -> ComponentScores:
    per_fact = np.tile(np.array(values)[None, :, None], (2, 1, 1))
    return ComponentScores(
        method="test", metric="m", sign="s", components=components, roles=("last",), per_fact=per_fact
    )


MIXED = tuple(map(Component.parse, ("m0", "a1.h0", "a1.h1", "a1.h2", "a2", "m2.n5", "m2.n6")))


def test_a_mask_selects_what_a_brute_force_count_says(any_model: Model) -> None:
    mask, full = mask_of(any_model, MIXED), brute_force(any_model, MIXED)
    assert mask.n_selected == sum(int(f.sum()) for f in full.values())
    for name, expected in full.items():
        assert (name in mask.entries) == bool(expected.any())
        if name in mask.entries:
            assert torch.equal(mask.full(name), expected)
            assert mask.is_whole(name) == bool(expected.all())


def test_all_heads_together_are_all_of_attention_but_the_output_bias(any_model: Model) -> None:
    heads = mask_of(any_model, all_components(any_model, ("head",))).n_selected
    whole = mask_of(any_model, all_components(any_model, ("attention",))).n_selected
    a = any_model.architecture
    bias = sum(p.numel() for name, p in any_model.hf.named_parameters() if name.endswith(f"{a.output}.bias"))
    assert heads + bias == whole


def test_a_mask_does_not_depend_on_order_or_repetition(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    mask, again = mask_of(model, MIXED), mask_of(model, (*reversed(MIXED), MIXED[0]))
    assert mask.components == again.components
    assert all(torch.equal(mask.entries[name], again.entries[name]) for name in mask.entries)


def test_an_empty_mask_selects_nothing(tiny_model: Callable[..., Model]) -> None:
    assert mask_of(tiny_model(), ()).n_selected == 0


@pytest.mark.parametrize("kinds", [("mlp",), ("head",), ("neuron",), ("mlp", "attention", "head")])
@pytest.mark.parametrize("budget", [0.2, 0.37, 1.0, 5000])
def test_a_selection_is_the_longest_positive_prefix_within_budget(
    tiny_model: Callable[..., Model], kinds: tuple, budget: float
) -> None:
    model = tiny_model("qwen2")
    components = all_components(model, ("mlp", "attention", "head", "neuron"))
    values = list(np.random.default_rng(0).normal(size=len(components)))
    scores = scored(components, values)
    limit = budget if isinstance(budget, int) else budget * n_localizable(model)
    best = [c for c in scores.ranking() if c.kind in kinds and values[components.index(c)] > 0]
    mask = select_components(scores, model, budget=budget, kinds=kinds)
    n = len(mask.components)

    def size(components: list[Component]) -> int:
        return sum(int(f.sum()) for f in brute_force(model, tuple(components)).values())

    assert set(mask.components) == set(best[:n])
    assert mask.n_selected == size(best[:n]) <= limit
    assert n == len(best) or size(best[: n + 1]) > limit


def test_a_budget_of_exactly_one_component_selects_it(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    components = all_components(model, ("mlp",))
    size = mask_of(model, components[:1]).n_selected
    scores = scored(components, [0.0, 2.0, 1.0])
    for budget in (size, size / n_localizable(model)):
        assert select_components(scores, model, budget=budget).components == (Component("mlp", 1),)
    with pytest.raises(ValueError, match=f"the best component m1 alone has {size}"):
        select_components(scores, model, budget=size - 1)


@pytest.mark.parametrize("budget", [0, 0.0, -1, 1.5, True, float("nan")])
def test_a_budget_out_of_range_is_refused(tiny_model: Callable[..., Model], budget: float) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="budget: got"):
        select_components(scored(all_components(model, ("mlp",)), [1.0] * 3), model, budget=budget)


def test_scores_without_a_positive_one_of_the_kind_are_refused(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    scores = scored(all_components(model, ("mlp",)), [0.0, -1.0, -2.0])
    with pytest.raises(ValueError, match="no mlp has a positive score"):
        select_components(scores, model, budget=0.5)
    with pytest.raises(ValueError, match="no attention has"):
        select_components(scores, model, budget=0.5, kinds=("attention",))
    with pytest.raises(ValueError, match=r"unknown component kind: 'mpl'\. Did you mean 'mlp'"):
        select_components(scores, model, budget=0.5, kinds=("mpl",))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "text", ["m1", "m0 m2", "a0.h0 a0.h1 a2.h3", "a1.h0 a1.h2", "a0 m1 m2.n3", "m1.n3 m1.n4 m0.n7"]
)
def test_a_random_control_has_the_same_kinds_and_exactly_the_same_size(any_model: Model, text: str) -> None:
    components = tuple(map(Component.parse, text.split()))
    mask = mask_of(any_model, components)
    kinds = Counter(c.kind for c in components)
    for seed in range(5):
        control = random_mask_like(mask, any_model, seed=seed)
        assert control.n_selected == mask.n_selected
        assert Counter(c.kind for c in control.components) == kinds


def test_random_controls_are_seeded_and_reach_every_layer(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    mask = mask_of(model, [Component("mlp", 1)])
    draws = [random_mask_like(mask, model, seed=seed).components for seed in range(30)]
    assert draws == [random_mask_like(mask, model, seed=seed).components for seed in range(30)]
    assert len(set(draws)) == 3
    heads = mask_of(model, [Component("head", 0, 0), Component("head", 0, 1)])
    pairs = {random_mask_like(heads, model, seed=seed).components for seed in range(60)}
    assert len(pairs) == 6  # two heads of one group: one of two groups in one of three layers


def test_a_mask_without_components_has_no_random_control(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="lists no components"):
        random_mask_like(mask_of(model, ()), model, seed=0)


def test_malformed_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="one of each per name"):
        ParameterMask(entries={"w": torch.ones(1, dtype=torch.bool)}, shapes={})
    for wrong in (torch.ones(2, 1), torch.ones(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask of 'w'"):
            ParameterMask(entries={"w": wrong}, shapes={"w": (2, 4)})
