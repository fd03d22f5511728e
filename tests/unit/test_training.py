"""What a training step costs may change; what it computes may not."""

import pytest
import torch

from mechunlearn.activations import hooked
from mechunlearn.bench.memory import peak_bytes
from mechunlearn.components import Component
from mechunlearn.edit.inject import inject
from mechunlearn.edit.losses import (
    Term,
    Tokens,
    answer_loss,
    batches,
    fact_tokens,
    joined,
    predict,
    text_loss,
    text_tokens,
    weighted_sum,
)
from mechunlearn.edit.prefix import PrefixCache, first_layer
from mechunlearn.edit.training import Forward, Trainable, low_rank_trainable, masked_trainable, train
from mechunlearn.masks import mask_of
from mechunlearn.models import block, mlp

TEXTS = ["The favourite colour of Bram is red", "Cora lives", "Where is Dina Marlowe born?", "Lima, the city of Ivo."]


def mlps(model, *layers):
    return mask_of(model, [Component("mlp", layer) for layer in layers])


def text_batches(model, size=2):
    return batches(text_tokens(model, TEXTS), size, seed=0)


def text_term(model, size=2):
    return weighted_sum([Term(weight=1.0, objective=text_loss, batches=text_batches(model, size))])


def trained(model, trainable, loss, **options):
    history = train(model, trainable, loss, steps=5, learning_rate=1e-2, **options)
    return history, {name: leaf.detach() for name, leaf in trainable.leaves.items()}


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], atol=2e-6, rtol=0)


def has_own_forward(model):
    return [name for name, module in model.hf.named_modules() if "forward" in module.__dict__]


def keeps_denormals() -> bool:
    return float(torch.tensor(1e-39) * 1.0) > 0


@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_zero_while_training_and_as_before_afterwards(tiny_model, flush):
    model, seen = tiny_model("gpt2"), []
    torch.set_flush_denormal(flush)
    try:
        trained(
            model,
            masked_trainable(model, mlps(model, 1)),
            text_term(model),
            on_step=lambda step: seen.append(keeps_denormals()),
        )
        after = keeps_denormals()
    finally:
        torch.set_flush_denormal(False)
    assert seen == [False] * 5
    assert after is not flush


@pytest.mark.parametrize("first", [1, 2])
def test_the_prefix_cache_changes_no_edit(any_model, split, first):
    options = {"steps": 4, "learning_rate": 1e-2, "batch_size": 6, "accumulation": 2, "forms": "all", "text": TEXTS}
    plain, cached = (
        inject(any_model, mlps(any_model, first), split, **options, retain_loss="kl", prefix_cache_gb=gb)
        for gb in (0.0, 1.0)
    )
    assert cached.history == pytest.approx(plain.history, rel=1e-6)
    for name, value in plain.values.items():
        torch.testing.assert_close(cached.values[name], value, atol=5e-6, rtol=0)


def test_joined_batches_are_served_row_by_row(tiny_model, tiny_split):
    model = tiny_model()
    facts = fact_tokens(model, (*tiny_split.forget, *tiny_split.forget[:5]))  # some of them twice

    def loss():
        rows = joined(batches(facts, 5, seed=0), text_batches(model))
        return weighted_sum([Term(weight=1.0, objective=answer_loss, batches=rows)])

    plain, cached = (
        trained(model, masked_trainable(model, mlps(model, 1)), loss(), prefix_cache_gb=gb) for gb in (0.0, 1.0)
    )
    assert_same(plain, cached)


def test_each_row_goes_through_the_blocks_below_once(tiny_model):
    model, run = tiny_model(), []
    module = mlp(model, 0)
    own = module.forward
    module.forward = lambda stream: run.append(len(stream)) or own(stream)  # a hook would turn the cache off
    rows = text_tokens(model, TEXTS)
    same_width = Tokens(ids=rows.ids[:, :4], is_target=rows.is_target[:, :4], lengths=torch.full((4,), 4),
                        starts=rows.starts)  # fmt: skip
    loss = weighted_sum([Term(weight=1.0, objective=text_loss, batches=batches(same_width, 2, seed=0))])
    for options, expected in (({}, 4), ({"prefix_cache_gb": 0.0}, 2 * 5)):
        run.clear()
        trained(model, masked_trainable(model, mlps(model, 1, 2)), loss, **options)
        assert sum(run) == expected


@pytest.mark.parametrize("padding", [0, 2])
def test_the_stream_of_any_row_in_any_batch_is_what_the_model_computes(any_model, padding, monkeypatch):
    monkeypatch.setattr("mechunlearn.edit.prefix.padding_token", lambda model: padding)
    model, generator = any_model, torch.Generator().manual_seed(0)
    cache = PrefixCache.below(model, mlps(model, 2).entries)
    pool = torch.randint(0, 4, (6, 9), generator=generator)  # the padding token is a real one here, too
    pool[0, 5:], pool[1, 2:], pool[2] = padding, padding, padding
    for _ in range(6):
        chosen = torch.randint(6, (4,), generator=generator)
        ids = pool[chosen, : int(torch.randint(3, 10, (1,), generator=generator))]
        with hooked(model, record=[("block", 1)]) as seen, torch.no_grad():
            model.hf(ids, use_cache=False)
        torch.testing.assert_close(cache.streams(ids, model.hf.forward), seen["block", 1], atol=2e-6, rtol=1e-5)
    assert cache.held == sum(row.nbytes for row in cache._rows.values())
    cache.streams(pool[:2], model.hf.forward)
    kept = set(cache._rows)
    cache.streams(pool[:2, :6], model.hf.forward)
    assert set(cache._rows) == kept, "with less padding they are the same rows"


def test_a_full_cache_keeps_to_its_limit_and_changes_nothing(tiny_model, monkeypatch):
    model, made = tiny_model(), []
    below = PrefixCache.below.__func__
    monkeypatch.setattr(PrefixCache, "below", classmethod(lambda *a, **k: made.append(below(*a, **k)) or made[-1]))
    room = 20 * model.d_model * 4  # for 20 positions: some of the rows
    plain, cached = (
        trained(model, masked_trainable(model, mlps(model, 1)), text_term(model), prefix_cache_gb=size / 1e9)
        for size in (0, room)
    )
    assert_same(plain, cached)
    assert 0 < made[1].held <= room
    assert 0 < len(made[1]._rows) < len(TEXTS)
    assert made[0].held == 0


def test_the_prefix_ends_at_the_earliest_parameter_that_is_trained(tiny_model):
    model = tiny_model("gpt2")
    names = list(mask_of(model, [Component("mlp", 2), Component("head", 1, 0)]).entries)
    assert first_layer(model, names) == 1
    for other in ("transformer.wte.weight", "transformer.ln_f.weight", "transformer.h.0.ln_1.weight"):
        assert first_layer(model, [*names, other]) == 0
    assert first_layer(model, []) == 0
    assert first_layer(model, ["transformer.h.12.mlp.c_fc.weight", "transformer.h.3.mlp.c_fc.weight"]) == 3


@pytest.mark.parametrize("trained_part", ["block 0", "embedding"])
def test_nothing_is_cached_where_the_first_block_or_the_embedding_is_trained(tiny_model, trained_part):
    model, entered = tiny_model(), []
    trainable = masked_trainable(model, mlps(model, 0, 2))
    if trained_part == "embedding":
        name = "model.embed_tokens.weight"
        leaf = torch.nn.Parameter(model.hf.get_parameter(name).detach().clone())
        trainable = Trainable(leaves={name: leaf}, compute=dict)

    def loss(call, forward):
        entered.extend(has_own_forward(model))
        return text_term(model)(call, forward)

    history, _ = trained(model, trainable, loss)
    assert not entered
    assert history[-1] < history[0]


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}])
def test_forwards_and_parameters_come_back_from_training_and_from_errors(tiny_model, options):
    model = tiny_model()
    sent = block(model, 2)
    sent.forward = own = sent.forward  # as accelerate leaves it
    objects = [(name, id(parameter)) for name, parameter in model.hf.named_parameters()]
    inside = []

    def fails(call, forward):
        inside.extend(has_own_forward(model))
        value = text_term(model)(call, forward)
        if call == 1:
            raise RuntimeError("loss")
        return value

    for loss in (text_term(model), fails):
        try:
            trained(model, masked_trainable(model, mlps(model, 1)), loss, **options)
        except RuntimeError as error:
            assert str(error) == "loss"  # noqa: PT017
        assert has_own_forward(model) == ["model.layers.2"]
        assert sent.forward is own
        assert [(name, id(parameter)) for name, parameter in model.hf.named_parameters()] == objects
        assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.hf.parameters())
    assert "" in inside  # the model's own forward is another one in between


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_loss_that_looks_at_activations_sees_those_of_its_batch(tiny_model, layer):
    model = tiny_model()
    rows = text_batches(model)
    found = []

    def loss(_call, forward):
        batch = next(rows)
        with hooked(model, record=[("block", layer)]) as seen:
            value = text_loss(*predict(forward, batch))
        found.append((batch.ids, seen["block", layer].detach()))
        return value

    train(model, masked_trainable(model, mlps(model, 2)), loss, steps=1, learning_rate=1e-3)
    for ids, stream in found:
        with hooked(model, record=[("block", layer)]) as seen, torch.no_grad():
            model.hf(ids, use_cache=False)  # before the first update
        torch.testing.assert_close(stream, seen["block", layer], atol=1e-6, rtol=1e-5)


def test_a_hook_above_the_prefix_sees_each_pass_once_even_if_it_stops_it(tiny_model):
    """Rows that are run for the cache alone are none of its business."""
    model, seen = tiny_model(), []

    class Stop(Exception):
        pass

    def stop(_module, inputs, _output):
        seen.append(inputs[0])
        raise Stop

    ids = text_tokens(model, TEXTS).ids
    cache = PrefixCache.below(model, mlps(model, 1).entries)
    cache.streams(ids[:1], model.hf.forward)  # so that the others are run alone
    handle = block(model, 1).register_forward_hook(stop)
    with cache.active(), pytest.raises(Stop):
        model.hf(ids, use_cache=False)
    handle.remove()
    assert [stream.shape[0] for stream in seen] == [len(ids)]


def test_passes_with_masks_or_embeddings_are_left_alone(tiny_model):
    model = tiny_model()
    ids = text_tokens(model, TEXTS).ids
    mask = (torch.arange(ids.shape[1]) > 1).long().expand(len(ids), -1)  # padding on the left
    embedded = model.hf.get_input_embeddings()(ids).detach() * 2
    asked = ({"input_ids": ids, "attention_mask": mask}, {"inputs_embeds": embedded}, {"input_ids": ids})
    with torch.no_grad():
        expected = [model.hf(**kwargs).logits for kwargs in asked]
        written = model.hf.generate(ids[:1], max_new_tokens=3, do_sample=False)
        cache = PrefixCache.below(model, mlps(model, 1).entries)
        with cache.active():
            for kwargs, logits in zip(asked, expected, strict=True):
                assert torch.equal(model.hf(**kwargs).logits, logits)
            assert torch.equal(model.hf.generate(ids[:1], max_new_tokens=3, do_sample=False), written)
            assert not cache.held
            torch.testing.assert_close(model.hf(ids, use_cache=False).logits, expected[2])
            assert cache.held


def test_the_original_model_is_asked_from_the_same_streams(tiny_model):
    model = tiny_model()
    trainable = masked_trainable(model, mlps(model, 1))
    with torch.no_grad():
        for leaf in trainable.leaves.values():
            leaf.add_(0.1)
    batch = next(text_batches(model))
    cache = PrefixCache.below(model, trainable.overrides())
    kept = torch.arange(batch.ids.shape[1])
    with torch.no_grad():
        plain = [model.hf(batch.ids, use_cache=False).logits, Forward(model, trainable.overrides())(batch.ids, kept)]
        with cache.active():
            before = model.hf(batch.ids, use_cache=False).logits
            size = cache.held
            after = Forward(model, trainable.overrides())(batch.ids, kept)
    assert cache.held == size > 0
    torch.testing.assert_close([before, after], plain)
    assert not torch.allclose(before, after, atol=0.01)


@pytest.mark.parametrize("gb", [0.0, 1.0])
def test_checkpointing_changes_no_training(any_model, gb):
    mask = mask_of(any_model, [Component("mlp", 1), Component("head", 2, 1)])
    plain, again = (
        trained(any_model, masked_trainable(any_model, mask), text_term(any_model), checkpoint=on, prefix_cache_gb=gb)
        for on in (False, True)
    )
    assert_same(plain, again)
    assert plain[0][-1] < plain[0][0]


def test_checkpointing_changes_no_low_rank_training(tiny_model):
    model = tiny_model()
    plain, again = (
        trained(model, low_rank_trainable(model, mlps(model, 1, 2), 2), text_term(model), checkpoint=on)
        for on in (False, True)
    )
    assert_same(plain, again)


def test_checkpointing_keeps_the_activations_of_one_block(tiny_model):
    ids = torch.randint(1, 100, (32, 40), generator=torch.Generator().manual_seed(0))
    rows = Tokens(ids=ids, is_target=torch.arange(40).expand(32, -1) == 39, lengths=torch.full((32,), 40),
                  starts=torch.full((32,), 39))  # fmt: skip
    loss = weighted_sum([Term(weight=1.0, objective=answer_loss, batches=batches(rows, 32, seed=0))])
    peak = {}
    for n_layers in (3, 9):
        model = tiny_model(n_layers=n_layers)
        trainable = masked_trainable(model, mlps(model, 0))
        for checkpoint in (False, True):
            peak[n_layers, checkpoint] = peak_bytes(
                lambda m=model, t=trainable, c=checkpoint: train(m, t, loss, steps=1, learning_rate=1e-3, checkpoint=c),
                model.device,
            )
    stream = ids.numel() * model.d_model * 4
    assert (peak[9, True] - peak[3, True]) / 6 < 1.5 * stream
    assert (peak[9, False] - peak[3, False]) / 6 > 8 * stream


@pytest.mark.parametrize("spec", ["m1", "a2.h1", "m0.n3"])
def test_gradients_and_optimizer_state_are_held_for_masked_entries_alone(tiny_model, monkeypatch, spec):
    model, made = tiny_model(), []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            leaves = [leaf for group in self.param_groups for leaf in group["params"]]
            moments = [value for state in self.state.values() for value in state.values() if value.ndim]
            made.append((sum(leaf.grad.nbytes for leaf in leaves), sum(value.nbytes for value in moments)))
            assert all(parameter.grad is None for parameter in model.hf.parameters())

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    mask = mask_of(model, [Component.parse(spec)])
    trained(model, masked_trainable(model, mask), text_term(model))
    assert made == [(4 * mask.n_selected, 2 * 4 * mask.n_selected)] * 5


def test_a_matrix_masked_in_part_is_there_twice_more_during_a_step(tiny_model):
    """Once as the tensor that stands in for it, once as the gradient of that; see `masked_trainable`."""
    peak = {}
    for n_layers in (3, 6):
        model = tiny_model(n_layers=n_layers)
        mask = mask_of(model, [Component("neuron", layer, 0) for layer in range(n_layers)])
        trainable, ids = masked_trainable(model, mask), torch.tensor([[5, 6]])
        peak[n_layers] = peak_bytes(
            lambda m=model, t=trainable, i=ids: Forward(m, t.overrides())(i, torch.tensor([0])).sum().backward(),
            model.device,
        )
    matrices = 3 * model.d_model * model.d_mlp * 4
    assert peak[6] - peak[3] == pytest.approx(3 * 2 * matrices, rel=0.25)
