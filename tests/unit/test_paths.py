"""Path patching: equal to a literal version with hooks on everything, to closed forms, and the laws of its methods."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mechunlearn.activations import Tokens, exact, hooked, last_logits, untouched
from mechunlearn.components import Component
from mechunlearn.facts import Fact, FactSet
from mechunlearn.localize.activation_patching import activation_patching
from mechunlearn.localize.fact_lookup_paths import extraction_heads, fact_lookup_paths, receivers_of
from mechunlearn.localize.pairs import PairBatch, build_pairs, to_batch
from mechunlearn.localize.patching import exchange
from mechunlearn.localize.path_patching import path_effects, path_patching
from mechunlearn.localize.paths import FINAL, Receiver, direct_effects
from mechunlearn.localize.scoring import at_roles, measure_of
from mechunlearn.models import (
    Model,
    all_components,
    final_norm,
    head_input,
    mlp,
    projection,
    projection_columns,
    unembedding,
)

MakeModel = Callable[..., Model]
MLP0, MLP1, HEAD = Component("mlp", 0), Component("mlp", 1), Component("head", 0, 1)


@pytest.fixture(scope="module")
def facts(tiny_facts: FactSet) -> tuple[Fact, ...]:
    return tiny_facts.of("colour").facts[:6]


def literal(model: Model, batch: PairBatch, senders, receivers, roles) -> torch.Tensor:
    """Denoising in the two passes of Wang et al., whole forward passes with every sublayer frozen by a hook."""
    layers = range(model.n_layers)
    every = [(kind, layer) for kind in ("mlp", "attention", "head") for layer in layers]
    selected = at_roles(batch, roles).any(dim=0)
    row, k = selected.nonzero(as_tuple=True)
    to, origin = batch.corrupt_positions[row, k], batch.clean_positions[row, k]
    with hooked(model, record=every) as clean:
        last_logits(model, batch.clean)
    with hooked(model, record=every) as base:
        before = batch.logit_diff(last_logits(model, batch.corrupt))
    frozen, live, raw = {}, set(), {}

    def put(place, columns=slice(None)):
        value = frozen.get(place, base[place]).clone()
        rows = row[:, None]
        index = torch.arange(value.shape[-1])[columns]
        value[rows, to[:, None], index] = clean[place][rows, origin[:, None], index]
        frozen[place] = value

    for place in every:
        frozen.setdefault(place, base[place])
    for sender in senders:
        width = slice((sender.index or 0) * model.d_head, ((sender.index or 0) + 1) * model.d_head)
        put((sender.kind, sender.layer), width if sender.kind == "head" else slice(None))
        if sender.kind == "head":  # its sublayer's write follows from the heads' outputs, all of them set
            live.add(("attention", sender.layer))

    def freeze(place):
        def change(value):
            raw[place] = value
            return value if place in live else frozen[place]

        return change

    seen, handles = {}, []
    for r in receivers:
        if r.part not in ("final", "mlp"):
            module = projection(model, r.layer, r.part)
            handles.append(module.register_forward_hook(lambda _m, _i, out, r=r: seen.__setitem__(r, out.clone())))
    with hooked(model, change={place: freeze(place) for place in every}):
        logits = last_logits(model, batch.corrupt)
    for handle in handles:
        handle.remove()
    if receivers == [FINAL]:
        return batch.logit_diff(logits) - before
    handles, change = [], {}
    mask = torch.zeros(batch.corrupt.ids.shape, dtype=torch.bool)
    mask[row, to] = True
    for r in receivers:
        if r.part == "mlp":
            change["mlp", r.layer] = lambda own, new=raw["mlp", r.layer]: torch.where(mask[..., None], new, own)
        else:

            def replace(_m, _i, out, r=r):
                out, columns = out.clone(), projection_columns(model, r.part, r.head)
                out[..., columns] = torch.where(mask[..., None], seen[r][..., columns], out[..., columns])
                return out

            handles.append(projection(model, r.layer, r.part).register_forward_hook(replace))
    with hooked(model, change=change):
        after = batch.logit_diff(last_logits(model, batch.corrupt))
    for handle in handles:
        handle.remove()
    return after - before


KEYS_AND_VALUES = [Receiver(part=part, layer=layer, head=1) for layer in (1, 2) for part in ("key", "value")]


@pytest.mark.parametrize(
    ("senders", "receivers", "roles"),
    [
        ([MLP1], [FINAL], ("last",)),
        ([MLP0, Component("attention", 2)], [FINAL], ("all",)),
        ([HEAD], [FINAL], ("all",)),
        ([MLP0], KEYS_AND_VALUES, ("subject",)),
        ([HEAD, Component("head", 0, 2)], [Receiver(part="query", layer=1, head=3)], ("all",)),
        ([HEAD, MLP0], [Receiver(part="mlp", layer=1), Receiver(part="mlp", layer=2)], ("all",)),
        ([Component("attention", 1)], [Receiver(part="mlp", layer=1)], ("all",)),
    ],
)
def test_direct_effects_equal_the_literal_two_passes(senders, receivers, roles, any_model: Model, facts) -> None:
    any_model.hf.double()  # in float32 rounding hides the smallest of these effects
    batch = to_batch(any_model, build_pairs(any_model, facts))
    with untouched(any_model), torch.no_grad():
        expected = literal(any_model, batch, senders, receivers, roles)
    ours = path_effects(any_model, batch, senders, receivers, roles=roles)
    if not (any_model.architecture.name == "gpt_neox" and senders[0] == Component("attention", 1)):
        assert expected.abs().max() > 1e-6  # in GPT-NeoX attention and MLP of a block are parallel: no such path
    torch.testing.assert_close(ours.direct, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.total, ours.direct + ours.indirect)


def test_a_heads_direct_effect_has_a_closed_form_in_a_model_of_one_block(tiny_model: MakeModel, facts) -> None:
    """logits = W_U norm(x + W_O (z_clean - z_corrupt)), with the MLP's output left as it was."""
    model = tiny_model("llama", n_layers=1)
    batch = to_batch(model, build_pairs(model, facts))
    last_c, last_k = batch.clean.last, batch.corrupt.last
    rows = torch.arange(len(last_c))
    ours = path_effects(model, batch, [HEAD], roles=("last",))
    with torch.no_grad():
        with hooked(model, record=[("head", 0)]) as clean:
            last_logits(model, batch.clean)
        with hooked(model, record=[("head", 0), ("block", 0)]) as corrupt:
            before = batch.logit_diff(last_logits(model, batch.corrupt))
        columns = slice(model.d_head, 2 * model.d_head)
        moved = clean["head", 0][rows, last_c, columns] - corrupt["head", 0][rows, last_k, columns]
        x = corrupt["block", 0][rows, last_k] + moved @ head_input(model, 0).weight[:, columns].T
        norm = final_norm(model)
        normed = x / (x.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
        expected = batch.logit_diff(normed @ unembedding(model).weight.T) - before
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(ours.direct, expected, atol=1e-5, rtol=1e-4)
    assert (ours.indirect.abs() > 1e-4).any()  # the MLP of the block reads the head, too


def test_the_last_mlp_acts_directly_only_and_no_path_leads_backwards_or_from_other_tokens(
    any_model: Model, facts
) -> None:
    batch = to_batch(any_model, build_pairs(any_model, facts))
    last = Component("mlp", any_model.n_layers - 1)
    effects = path_effects(any_model, batch, [last], roles=("all",))
    assert effects.direct.abs().max() > 1e-3
    assert effects.indirect.abs().max() < 1e-5
    assert path_effects(any_model, batch, [MLP0], roles=("subject",)).direct.abs().max() < 1e-6
    backwards = path_effects(any_model, batch, [last], [Receiver(part="key", layer=1, head=0)])
    assert backwards.direct.abs().max() < 1e-5


def test_one_by_one_direct_effects_are_those_of_the_engine(any_model: Model, facts) -> None:
    batch = to_batch(any_model, build_pairs(any_model, facts))
    components = all_components(any_model, ("mlp", "attention", "head"))
    with untouched(any_model), torch.no_grad():
        places = [(kind, layer) for kind in ("mlp", "attention", "head") for layer in range(any_model.n_layers)]
        given = exchange(any_model, batch, places, restore=False)
        changed = given.cells(at_roles(batch, ("all",)))[0]
        found = direct_effects(any_model, given, components, changed, measure_of(batch, "logit_diff"))
    for component, mine in zip(components, found, strict=True):
        one = path_effects(any_model, batch, [component], roles=("all",), form="noise").direct
        torch.testing.assert_close(mine, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_projections_columns_are_those_of_the_head(part, any_model: Model) -> None:
    """Without values a head writes nothing; without queries or keys it attends to all its past alike."""
    model, ids = any_model, torch.tensor([[0, 20, 31, 42, 53, 64]])
    tokens = Tokens(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), last=torch.tensor([5]))
    head = 1
    values: list[torch.Tensor] = []

    def silence(_module, _inputs, output):
        output = output.clone()
        output[..., projection_columns(model, part, head)] = 0
        return output

    with untouched(model), torch.no_grad():
        with hooked(model, record=[("head", 1)]) as before:
            last_logits(model, tokens)
        handles = [projection(model, 1, part).register_forward_hook(silence)]
        handles.append(projection(model, 1, "value").register_forward_hook(lambda _m, _i, out: values.append(out)))
        with hooked(model, record=[("head", 1)]) as after:
            last_logits(model, tokens)
        for handle in handles:
            handle.remove()
    group = model.n_heads // model.n_kv_heads
    silenced = [head] if part == "query" else list(range(head * group, (head + 1) * group))
    z, own = (seen["head", 1][0, -1].unflatten(-1, (model.n_heads, -1)) for seen in (after, before))
    for h in range(model.n_heads):
        v = values[0][0, :, projection_columns(model, "value", h // group)]
        expected = own[h] if h not in silenced else v.mean(dim=0)
        torch.testing.assert_close(z[h], expected, atol=1e-5, rtol=1e-4)
        assert part == "value" or h not in silenced or not torch.allclose(z[h], own[h], atol=1e-4)
    with pytest.raises(ValueError, match=f"{part} head: got 9, allowed: 0 to"):
        projection_columns(model, part, 9)


def test_bad_senders_and_receivers_are_one_line(tiny_model: MakeModel, facts) -> None:
    model = tiny_model()
    batch = to_batch(model, build_pairs(model, facts))
    for senders, receivers, message in (
        ([], [FINAL], "got 0 senders"),
        ([MLP0], [], "0 receivers"),
        ([MLP0], [Receiver(part="key", layer=1, head=2)], r"allowed: layers 0 to 2, 4 query and 2 key"),
        ([MLP0], [Receiver(part="mlp", layer=3)], "allowed: layers 0 to 2"),
        ([HEAD, Component("attention", 0)], [FINAL], "attention 0 and heads of it"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            path_effects(model, batch, senders, receivers)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="option 'kinds'"):
        path_patching(model, facts, kinds=())


@pytest.mark.parametrize("form", ["denoise", "noise"])
def test_the_methods_effects_add_up_to_those_of_activation_patching(form, tiny_model: MakeModel, facts) -> None:
    model = tiny_model("gemma2")
    options = {"form": form, "kinds": ("mlp", "head"), "pairs_per_fact": 2}
    direct, indirect, total = (
        path_patching(model, facts, effect=effect, **options) for effect in ("direct", "indirect", "total")
    )
    np.testing.assert_allclose(direct.per_fact + indirect.per_fact, total.per_fact, atol=1e-5)
    np.testing.assert_allclose(total.per_fact, activation_patching(model, facts, **options).per_fact, atol=1e-5)
    assert not direct.per_fact[:, :, :-1].any()
    assert np.abs(direct.per_fact[:, :, -1]).max() > 1e-3


# --- fact lookup ---


def test_extraction_heads_are_those_a_controlled_test_finds() -> None:
    heads = [Component("head", layer, h) for layer in range(5) for h in range(20)]
    rng = np.random.default_rng(0)
    direct = rng.standard_normal((40, 100))
    direct[:, 13] += 2.0
    direct[:, 57] += 1.0
    direct[:, 80] -= 3.0
    direct[:, 99] = 0.0
    chosen, notes = extraction_heads(heads, direct, fdr=0.01, max_heads=10)
    assert chosen == [heads[13], heads[57]]
    assert notes["n_significant"] == 2
    assert notes["extraction_heads"]["a0.h13"]["direct_effect"] == pytest.approx(direct[:, 13].mean())
    assert notes["extraction_heads"]["a0.h13"]["p"] < notes["extraction_heads"]["a0.h13"]["adjusted_p"] < 0.01
    assert extraction_heads(heads, direct, fdr=0.01, max_heads=1)[0] == [heads[13]]
    with pytest.raises(ValueError, match=r"no head's direct effect is positive .* give more facts"):
        extraction_heads(heads[70:], direct[:, 70:], fdr=0.01, max_heads=10)


def test_nulls_rarely_pass_the_test() -> None:
    heads = [Component("head", 0, h) for h in range(50)]
    rng, passed = np.random.default_rng(1), 0
    for _ in range(200):
        try:
            extraction_heads(heads, rng.standard_normal((30, 50)), fdr=0.05, max_heads=10)
            passed += 1
        except ValueError:
            continue
    assert passed / 200 < 0.1  # 5% expected, and 0.1 is four standard deviations above


def test_receivers_are_the_key_value_heads_of_the_extraction_heads_in_their_own_layers(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    heads = [Component("head", 2, 3), Component("head", 1, 0), Component("head", 1, 1), Component("head", 0, 0)]
    found = [(r.layer, r.part, r.head) for r in receivers_of(model, heads)]
    expected = [(0, 0), (1, 0), (2, 1)]
    assert found == [(layer, part, head) for layer, head in expected for part in ("key", "value")]
    with pytest.raises(ValueError, match=r"block 0, and no MLP is before") as error:
        receivers_of(model, [Component("head", 0, 0), Component("head", 0, 2)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_scores_are_the_literal_path_effects_into_the_reported_receivers(
    architecture: str, tiny_model: MakeModel, facts
) -> None:
    model = tiny_model(architecture)
    scores = fact_lookup_paths(model, facts, fdr=1.0, max_heads=3)
    assert len(scores.notes["extraction_heads"]) == 3
    heads = [Component.parse(name) for name in scores.notes["extraction_heads"]]
    receivers = receivers_of(model, heads)
    assert scores.notes["receiver_layers"] == sorted({head.layer for head in heads})
    batch = to_batch(model, build_pairs(model, facts))
    for layer in range(model.n_layers):
        above = [receiver for receiver in receivers if receiver.layer > layer]
        found = scores.per_fact[:, scores.components.index(Component("mlp", layer)), 0]
        if not above:
            assert not found.any()
            continue
        with untouched(model), torch.no_grad():
            expected = exact(literal(model, batch, [Component("mlp", layer)], above, ("subject",)))
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_planted_mlp_is_ranked_first_though_another_moves_the_answer_more(
    tiny_model: MakeModel, tiny_facts: FactSet
) -> None:
    """MLP 0 is on every path, so plain patching puts it first; only MLP 1 was trained and writes what heads extract."""
    model, facts = tiny_model("llama", n_layers=4), tiny_facts.of("colour").facts[:16]
    batch = to_batch(model, build_pairs(model, facts))
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam([p.requires_grad_(True) for p in mlp(model, 1).parameters()], lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(last_logits(model, batch.clean), batch.answer).backward()
        optimizer.step()
    scores = fact_lookup_paths(model, facts, pairs_per_fact=2)
    assert scores.ranking()[0] == MLP1
    assert min(scores.notes["receiver_layers"]) > 1
    assert activation_patching(model, facts, kinds=("mlp",), roles=("subject",)).ranking()[0] == MLP0
