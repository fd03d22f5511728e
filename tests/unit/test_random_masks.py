"""Random controls: the same make and exactly the same size, seeded, by depth, and outside of the mask."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mechunlearn.components import MATRICES, Component, ComponentScores
from mechunlearn.masks import ParameterMask, mask_of, mask_of_entries, n_localizable, n_shared, union_of
from mechunlearn.matrix_patterns import seen_in
from mechunlearn.models import Model, all_components, matrix_parameters
from mechunlearn.random_masks import random_mask_like, random_matrices
from mechunlearn.selection import select_entries, select_exactly


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


def test_a_mask_of_nothing_has_no_random_control(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="selects nothing"):
        random_mask_like(mask_of(model, ()), model, seed=0)


def same(a: ParameterMask, b: ParameterMask) -> bool:
    return a.shapes == b.shapes and all(torch.equal(a.full(name), b.full(name)) for name in a.entries)


def patterns(model: Model, mask: ParameterMask, layers: range) -> Counter:
    """What a mask has of each type of matrix in some layers."""
    seen = [(m, seen_in(model, mask.entries, layer, m)) for layer in layers for m in MATRICES]
    return Counter((m, s.pattern()) for m, s in seen if s and s.pattern())


def thirds(model: Model) -> list[range]:
    n = model.n_layers
    return [range(n // 3 * i, n // 3 * (i + 1)) for i in range(3)]


def some_mask(model: Model, case: str) -> ParameterMask:
    generator = torch.Generator().manual_seed(3)
    shapes = mask_of(model, all_components(model)).shapes
    scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    low = {name: score for name, score in scores.items() if ".0." in name or ".1." in name}
    exact = ComponentScores(
        method="t", metric="m", sign="s", components=all_components(model), roles=("last",),
        per_fact=np.random.default_rng(1).normal(size=(1, 2 * model.n_layers, 1)),
    )  # fmt: skip
    mlp, attention = Component("mlp", 1), Component("attention", 0)
    first = mask_of(model, [mlp]).n_selected
    masks = {
        "output matrix": lambda: mask_of(model, [mlp], matrices=("out",)),
        "query and value": lambda: mask_of(model, [attention], matrices=("q", "v")),
        "every kind of matrix": lambda: mask_of(model, [mlp, attention], matrices=("in", "out", "k", "o")),
        "rows": lambda: select_entries(model, low, budget=900, granularity="row"),
        "columns": lambda: select_entries(model, low, budget=900, granularity="column"),
        "entries": lambda: select_entries(model, low, budget=901),
        "entries everywhere": lambda: select_entries(model, scores, budget=0.05),
        "exactly": lambda: select_exactly(exact, model, n_entries=first + 700, kinds=("mlp", "attention")),
        "heads and neurons": lambda: mask_of(model, map(Component.parse, "a0.h0 a0.h1 a1.h3 m1.n2 m1.n7".split())),
        "components and rows": lambda: union_of(
            mask_of(model, [Component("mlp", 0)]),
            select_entries(model, {n: s for n, s in low.items() if ".1." in n}, budget=500, granularity="row"),
        ),
        "a bias": lambda: mask_of_entries(
            model, {n: torch.ones(1, dtype=torch.bool) for n in shapes if ".1." in n and len(shapes[n]) == 1}
        ),
    }  # fmt: skip
    return masks[case]()


CASES = ("output matrix", "query and value", "every kind of matrix", "rows", "columns", "entries", "entries everywhere",
         "exactly", "heads and neurons", "components and rows")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_controls_of_all_masks_have_their_make_and_exactly_their_size(any_model: Model, case: str) -> None:
    mask = some_mask(any_model, case)
    kinds = Counter(component.kind for component in mask.components)
    draws = [random_mask_like(mask, any_model, seed=seed) for seed in range(3)]
    for control in draws:
        assert control.n_selected == mask.n_selected == sum(int(control.full(n).sum()) for n in control.entries)
        assert Counter(component.kind for component in control.components) == kinds
        if not kinds:
            layers = range(any_model.n_layers)
            assert patterns(any_model, control, layers) == patterns(any_model, mask, layers)
    assert same(draws[1], random_mask_like(mask, any_model, seed=1))
    assert not all(same(draw, mask) for draw in draws)


@pytest.mark.parametrize("case", CASES)
def test_controls_outside_of_the_mask_share_no_entry_with_it(tiny_model: Callable[..., Model], case: str) -> None:
    for architecture in ("gpt2", "gpt_neox", "qwen2"):
        model = tiny_model(architecture, n_layers=4)
        mask = some_mask(model, case)
        for seed in range(2):
            control = random_mask_like(mask, model, seed=seed, exclude=True)
            assert n_shared(control, mask) == 0
            assert control.n_selected == mask.n_selected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exclude", [False, True])
def test_controls_matched_in_depth_have_as_much_in_each_third(
    tiny_model: Callable[..., Model], case: str, exclude: bool
) -> None:
    model = tiny_model("qwen2", n_layers=9)
    mask = some_mask(model, case)
    for seed in range(2):
        control = random_mask_like(mask, model, seed=seed, matched="depth", exclude=exclude)
        assert n_shared(control, mask) == 0 or not exclude
        for third in thirds(model):
            of = [Counter(c.kind for c in m.components if c.layer in third) for m in (mask, control)]
            assert of[0] == of[1]
            n = [sum(p.n_weights * k for (_, p), k in patterns(model, m, third).items()) for m in (mask, control)]
            assert n[0] == n[1]


def test_biases_are_drawn_with_their_outputs_or_by_themselves(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("gpt2")
    rows = random_mask_like(some_mask(model, "rows"), model, seed=0)
    for layer in range(model.n_layers):
        for matrix in MATRICES:
            seen = seen_in(model, rows.entries, layer, matrix)
            if seen and seen.weights.any():
                assert torch.equal(seen.weights.expand(seen.shape[0], 1)[:, 0], seen.biases)
    control = random_mask_like(some_mask(model, "a bias"), model, seed=0)
    assert control.n_selected == some_mask(model, "a bias").n_selected
    assert all(len(shape) == 1 for name, shape in control.shapes.items() if control.entries[name].any())


def test_every_layer_and_every_entry_can_be_drawn(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("gpt_neox")
    mask = mask_of(model, [Component("attention", 1)], matrices=("k",))
    drawn = {random_mask_like(mask, model, seed=seed).parts for seed in range(30)}
    assert drawn == {("a0.k",), ("a1.k",), ("a2.k",)}
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    one = mask_of_entries(model, {name: torch.arange(32 * 48).reshape(32, 48) % 8 == 0})
    union = union_of(*(random_mask_like(one, model, seed=seed) for seed in range(60)))
    assert set(union.parts) == {"m0.out (in part)", "m1.out (in part)", "m2.out (in part)"}  # not their biases
    assert union.n_selected > 0.8 * 3 * 32 * 48  # of each layer 1 - (7/8)^20


def test_masks_that_list_parts_of_their_own_components_are_drawn_as_those(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    mask = mask_of(model, map(Component.parse, ("m1", "m1.n3", "a2", "a2.h1")))
    control = random_mask_like(mask, model, seed=0)
    assert control.n_selected == mask.n_selected
    assert Counter(c.kind for c in control.components) == {"mlp": 1, "attention": 1}


def test_impossible_controls_are_refused_in_one_line(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("qwen2")
    two = mask_of(model, [Component("mlp", 0), Component("mlp", 1)])
    heads = mask_of(model, [Component("head", layer, 0) for layer in range(3)] + [Component("head", 0, 2)])
    whole = mask_of(model, [Component("mlp", 0), Component("mlp", 1)], matrices=("out",))
    norm = mask_of_entries(model, {"model.norm.weight": torch.ones(1, dtype=torch.bool)})
    for mask, options, message in (
        (two, {"exclude": True}, r"wanted 2 .* kind mlp, but in layers 0 to 2 1 are left"),
        (two, {"exclude": True, "matched": "depth"}, "but in layers 0 to 0 0 are left"),
        (heads, {"exclude": True}, "wanted 4 .* groups of heads, but in layers 0 to 2 2 are left"),
        (whole, {"exclude": True}, "matrices 'out' with 32 free outputs, but in layers 0 to 2 0 are left"),
        (norm, {}, "no norms or embeddings"),
        (two, {"matched": "deep"}, "got matched 'deep', allowed: size, depth"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            random_mask_like(mask, model, seed=0, **options)
        assert "\n" not in str(error.value)


def test_random_matrices_are_whole_but_for_the_last_and_exact(any_model: Model) -> None:
    total = n_localizable(any_model)
    for seed, n in enumerate((1, 40, 3000, total // 2, total)):
        mask = random_matrices(any_model, n, seed)
        assert mask.n_selected == n == sum(int(mask.full(name).sum()) for name in mask.entries)
        assert sum("in part" in part for part in mask.parts) <= 1
        assert same(mask, random_matrices(any_model, n, seed))
    assert len({random_matrices(any_model, 40, seed).parts for seed in range(10)}) > 4
    has_gate = bool(matrix_parameters(any_model, 0, "gate"))
    drawn = union_of(*(random_matrices(any_model, 2000, seed) for seed in range(30)))
    types = {part.partition(".")[2].partition(" ")[0] for part in drawn.parts}
    assert types == {matrix for matrix in MATRICES if matrix != "gate" or has_gate}
    for n in (0, total + 1):
        with pytest.raises(ValueError, match=f"random matrices: got {n} entries, allowed: 1 to {total}"):
            random_matrices(any_model, n, 0)
