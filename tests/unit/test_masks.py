from collections.abc import Callable

import numpy as np
import pytest
import torch

from mechunlearn.components import Component, ComponentScores
from mechunlearn.edit.training import substituted
from mechunlearn.masks import (
    ParameterMask,
    mask_of,
    mask_of_entries,
    n_localizable,
    n_shared,
    select_components,
    union_of,
)
from mechunlearn.models import (
    Model,
    all_components,
    component_parameters,
    matrix_parameters,
    projection,
    projection_columns,
)


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


def test_malformed_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="one of each per name"):
        ParameterMask(entries={"w": torch.ones(1, dtype=torch.bool)}, shapes={})
    for wrong in (torch.ones(2, 1), torch.ones(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask of 'w'"):
            ParameterMask(entries={"w": wrong}, shapes={"w": (2, 4)})


def full(mask: ParameterMask) -> dict[str, torch.Tensor]:
    return {name: mask.full(name) for name in mask.entries}


def equal(a: ParameterMask, b: ParameterMask) -> bool:
    return full(a).keys() == full(b).keys() and all(torch.equal(mask, full(b)[name]) for name, mask in full(a).items())


def test_the_matrices_of_a_sublayer_are_disjoint_and_all_of_it(any_model: Model) -> None:
    for sublayer in all_components(any_model):
        names = [matrix for matrix in sublayer.matrices if matrix_parameters(any_model, sublayer.layer, matrix)]
        masks = [mask_of(any_model, [sublayer], matrices=(matrix,)) for matrix in names]
        whole = mask_of(any_model, [sublayer])
        assert sum(mask.n_selected for mask in masks) == whole.n_selected
        assert equal(union_of(*masks), whole)
        assert all(mask.parts == (f"{sublayer}.{m}",) for mask, m in zip(masks, names, strict=True))
        assert all(n_shared(a, b) == (a.n_selected if a is b else 0) for a in masks for b in masks)
        together = mask_of(any_model, [sublayer], matrices=sublayer.matrices)
        assert (together.components, together.parts) == ((sublayer,), ())


def test_changing_the_query_key_or_value_matrix_changes_that_projection_alone(any_model: Model) -> None:
    """The index maps of fused projections, checked against what attention reads from their outputs."""
    layer, x = 1, torch.randn(2, 5, any_model.d_model, generator=torch.Generator().manual_seed(0))
    columns = {"q": any_model.n_heads, "k": any_model.n_kv_heads, "v": any_model.n_kv_heads}
    parts = {"q": "query", "k": "key", "v": "value"}

    def heads(which: str) -> torch.Tensor:
        out = projection(any_model, layer, parts[which])(x)
        return torch.stack(
            [out[..., projection_columns(any_model, parts[which], h)] for h in range(columns[which])]
        ).detach()

    before = {which: heads(which) for which in columns}
    for which in columns:
        mask = mask_of(any_model, [Component("attention", layer)], matrices=(which,))
        parameters = dict(any_model.hf.named_parameters())
        with substituted(any_model, {n: parameters[n].detach() + mask.full(n) for n in mask.entries}):
            for other in columns:
                same = (heads(other) == before[other]).flatten(1).all(1)
                assert bool(same.all()) == (other != which)
                assert other != which or not same.any()


def test_matrices_of_heads_and_neurons_are_their_parts_of_them(any_model: Model) -> None:
    head, neuron = Component("head", 1, 2), Component("neuron", 0, 5)
    for component in (head, neuron):
        present = [m for m in component.matrices if matrix_parameters(any_model, component.layer, m)]
        masks = [mask_of(any_model, [component], matrices=(matrix,)) for matrix in present]
        assert equal(union_of(*masks), mask_of(any_model, [component]))
    query = mask_of(any_model, [head], matrices=("q",))
    weight = next(name for name in query.entries if name.endswith("weight"))
    assert int(query.full(weight).sum()) == any_model.d_head * any_model.d_model
    assert query.parts == ("a1.q (in part)",)


def test_matrices_that_a_component_does_not_have_are_refused(tiny_model: Callable[..., Model]) -> None:
    gpt2, llama = tiny_model("gpt2"), tiny_model("llama")
    with pytest.raises(ValueError, match="got matrices gate of m1, allowed: in, out"):
        mask_of(gpt2, [Component("mlp", 1)], matrices=("gate",))
    with pytest.raises(ValueError, match=r"got matrices out of a1, allowed: q, k, v, o"):
        mask_of(llama, [Component("mlp", 1), Component("attention", 1)], matrices=("out",))
    with pytest.raises(ValueError, match=r"unknown matrix: 'gat'\. Did you mean 'gate'"):
        mask_of(llama, [Component("mlp", 1)], matrices=("gat",))  # pyright: ignore[reportArgumentType]
    assert mask_of(gpt2, [Component("mlp", 1)], matrices=("in", "gate", "out")).components == (Component("mlp", 1),)


def test_unions_are_idempotent_commutative_and_count_shared_entries_once(any_model: Model) -> None:
    a = mask_of(any_model, [Component("head", 1, 0), Component("mlp", 2)])
    b = mask_of(any_model, [Component("head", 1, 1), Component("neuron", 2, 3)])
    c = mask_of(any_model, [Component("attention", 1)], matrices=("o",))
    for mask in (a, b, c):
        assert equal(union_of(mask, mask), mask)
        assert (union_of(mask, mask).components, union_of(mask, mask).parts) == (mask.components, mask.parts)
    assert equal(union_of(a, b), union_of(b, a))
    assert union_of(a, b).n_selected == a.n_selected + b.n_selected - n_shared(a, b)
    assert equal(union_of(a, b, c), union_of(a, union_of(b, c)))
    assert union_of().n_selected == 0


def test_a_union_names_what_is_whole_and_what_is_partial_once(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    out, neuron = (mask_of(model, [c], matrices=("out",)) for c in (Component("mlp", 1), Component("neuron", 1, 2)))
    assert union_of(neuron, out).parts == ("m1.out",)
    assert union_of(neuron, mask_of(model, [Component("mlp", 1)])).parts == ()
    assert union_of(neuron, mask_of(model, [Component("mlp", 2)])).named == "m2, m1.out (in part)"
    (name,) = out.entries
    other = ParameterMask(entries={name: torch.ones(1, 1, dtype=torch.bool)}, shapes={name: (2, 2)})
    with pytest.raises(ValueError, match="allowed: masks of one model"):
        union_of(out, other)


def test_entries_outside_of_sublayers_are_named_by_their_parameter(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    mask = mask_of_entries(model, {"model.norm.weight": torch.ones(1, dtype=torch.bool)})
    assert mask.parts == ("model.norm.weight",)
    assert mask_of_entries(model, {"model.norm.weight": torch.zeros(1, dtype=torch.bool)}).entries == {}
    with pytest.raises(ValueError, match="got 'nothing', allowed: parameters of 'tiny-llama-0'"):
        mask_of_entries(model, {"nothing": torch.ones(1, dtype=torch.bool)})
