import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mechunlearn import checkpoints, models
from mechunlearn.bridge import build_bridge
from mechunlearn.checkpoints import load_model, save_model
from mechunlearn.components import Component
from mechunlearn.models import (
    Model,
    NotSupported,
    all_components,
    component_parameters,
    first_output,
    with_first_output,
    wrap_model,
)

IDS = torch.tensor([[0, 5, 17, 42, 99, 63, 7], [0, 88, 23, 23, 110, 4, 51]])
LAYER = 1


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model.hf(IDS, use_cache=False).logits


@torch.no_grad()
def seen(model: Model, module: nn.Module, *, inputs: bool = False) -> Tensor:
    """What goes into or comes out of a module."""
    caught: list[Tensor] = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: caught.append(
            (args[0] if args else kwargs["hidden_states"]) if inputs else first_output(output)
        ),
        with_kwargs=True,
    )
    logits(model)
    hook.remove()
    return caught[0].clone()


@contextmanager
def perturbed(model: Model, name: str, mask: Tensor) -> Iterator[None]:
    """Add noise to the masked entries of one parameter."""
    parameter = dict(model.hf.named_parameters())[name]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * mask)
        yield
        parameter.copy_(before)


def sublayer_parameters(model: Model) -> dict[str, Tensor]:
    """Every parameter inside an attention or MLP module that is not a norm, by walking the modules."""
    found = {}
    for layer in range(model.n_layers):
        for sublayer in (models.mlp(model, layer), models.attention(model, layer)):
            ids = {id(p) for name, p in sublayer.named_parameters() if "norm" not in name}
            found |= {name: p for name, p in model.hf.named_parameters() if id(p) in ids}
    return found


def times_selected(model: Model, components: tuple[Component, ...]) -> dict[str, Tensor]:
    counts = {name: torch.zeros(p.shape, dtype=torch.int) for name, p in model.hf.named_parameters()}
    for component in components:
        for name, mask in component_parameters(model, component).items():
            assert mask.ndim == counts[name].ndim
            counts[name] += mask
    return counts


def test_mlps_and_attentions_cover_every_entry_of_theirs_once_and_nothing_else(any_model: Model) -> None:
    inside = sublayer_parameters(any_model)
    for name, count in times_selected(any_model, all_components(any_model)).items():
        assert (count == (name in inside)).all(), name


def test_heads_cover_attention_once_but_for_shared_keys_and_values_and_the_output_bias(any_model: Model) -> None:
    a = any_model.architecture
    shared = any_model.n_heads // any_model.n_kv_heads
    whole = times_selected(any_model, all_components(any_model, ("attention",)))
    for name, count in times_selected(any_model, all_components(any_model, ("head",))).items():
        grouped = a.layout == "separate" and any(f".{path}." in name for path in (a.key, a.value))
        expected = 0 if name.endswith(f"{a.output}.bias") else shared if grouped else 1
        assert (count == whole[name] * expected).all(), name


def test_neurons_cover_the_mlp_once_but_for_the_output_bias(any_model: Model) -> None:
    whole = times_selected(any_model, all_components(any_model, ("mlp",)))
    for name, count in times_selected(any_model, all_components(any_model, ("neuron",))).items():
        is_output_bias = name.endswith(f"{any_model.architecture.mlp_out}.bias")
        assert (count == whole[name] * (not is_output_bias)).all(), name


@pytest.mark.parametrize("head", [0, 2, 3])
def test_a_heads_query_key_and_value_entries_move_this_heads_z_and_no_other(any_model: Model, head: int) -> None:
    a, module = any_model.architecture, models.head_input(any_model, LAYER)
    shape = (*IDS.shape, any_model.n_heads, any_model.d_head)
    before = seen(any_model, module, inputs=True).reshape(shape)
    group = head * any_model.n_kv_heads // any_model.n_heads
    for name, mask in component_parameters(any_model, Component("head", LAYER, head)).items():
        if f".{a.output}." in name:
            continue
        with perturbed(any_model, name, mask):
            after = seen(any_model, module, inputs=True).reshape(shape)
        moved = {h for h in range(any_model.n_heads) if not torch.equal(before[:, :, h], after[:, :, h])}
        shared = a.layout == "separate" and f".{a.query}." not in name
        members = {h for h in range(any_model.n_heads) if h * any_model.n_kv_heads // any_model.n_heads == group}
        expected = members if shared else {head}
        assert moved <= expected, name
        # a key bias shifts all scores of a query alike and moves nothing without rotation: only then may it be still
        assert moved == expected or name.endswith("bias"), name


@contextmanager
def zeroed(module: nn.Module, entries: slice) -> Iterator[None]:
    def zero(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[..., entries] = 0
        return (changed, *args[1:])

    hook = module.register_forward_pre_hook(zero)
    yield
    hook.remove()


def test_a_heads_output_entries_act_exactly_through_its_z(any_model: Model) -> None:
    head = 2
    entries = slice(head * any_model.d_head, (head + 1) * any_model.d_head)
    name = f"{any_model.architecture.blocks}.{LAYER}.{any_model.architecture.output}.weight"
    mask = component_parameters(any_model, Component("head", LAYER, head))[name]
    plain = logits(any_model)
    with perturbed(any_model, name, mask):
        assert not torch.equal(logits(any_model), plain)
    with zeroed(models.head_input(any_model, LAYER), entries):
        without = logits(any_model)
        with perturbed(any_model, name, mask):
            torch.testing.assert_close(logits(any_model), without, rtol=0, atol=0)
        with perturbed(any_model, name, ~mask):
            assert not torch.equal(logits(any_model), without)


def test_a_neurons_entries_move_this_neuron_and_act_through_it(any_model: Model) -> None:
    neuron, module = 31, models.mlp_neurons(any_model, LAYER)
    before = seen(any_model, module, inputs=True)
    for name, mask in component_parameters(any_model, Component("neuron", LAYER, neuron)).items():
        if f".{any_model.architecture.mlp_out}." not in name:
            with perturbed(any_model, name, mask):
                after = seen(any_model, module, inputs=True)
            assert (before != after).any(dim=(0, 1)).nonzero().flatten().tolist() == [neuron], name
            continue
        with zeroed(module, slice(neuron, neuron + 1)):
            without = logits(any_model)
            with perturbed(any_model, name, mask):
                torch.testing.assert_close(logits(any_model), without, rtol=0, atol=0)


def test_a_block_adds_what_attention_and_mlp_write(any_model: Model) -> None:
    module = models.block(any_model, LAYER)
    before, after = seen(any_model, module, inputs=True), seen(any_model, module)
    attention = seen(any_model, models.attention_write(any_model, LAYER))
    mlp = seen(any_model, models.mlp_write(any_model, LAYER))
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)
    assert attention.abs().mean() > 1e-3
    assert mlp.abs().mean() > 1e-3


def test_logits_are_the_unembedding_of_the_final_norm(any_model: Model) -> None:
    normed = seen(any_model, models.final_norm(any_model))
    result = seen(any_model, models.unembedding(any_model))
    assert torch.equal(models.unembedding(any_model)(normed), result)
    cap = getattr(any_model.hf.config, "final_logit_softcapping", None)
    torch.testing.assert_close(torch.tanh(result / cap) * cap if cap else result, logits(any_model))
    assert seen(any_model, models.embedding(any_model)).shape == (*IDS.shape, any_model.d_model)


def test_replacing_a_first_output_changes_only_the_tensor() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert with_first_output(a, b) is b
    assert with_first_output((a, "weights"), b) == (b, "weights")
    assert first_output((b, None)) is b


def test_the_bridge_agrees_with_the_model_and_leaves_it_alone(any_model: Model) -> None:
    keys, plain = list(any_model.hf.state_dict()), logits(any_model)
    attention_kind = any_model.hf.config._attn_implementation
    with torch.no_grad():
        torch.testing.assert_close(any_model.bridge(IDS), plain, rtol=0, atol=1e-6)
    assert any_model.hf.config._attn_implementation == attention_kind
    assert list(any_model.hf.state_dict()) == keys
    assert torch.equal(logits(any_model), plain)


def test_the_bridge_hooks_are_the_modules_that_models_names(any_model: Model) -> None:
    sites = {
        Component("mlp", LAYER): seen(any_model, models.mlp_write(any_model, LAYER)),
        Component("attention", LAYER): seen(any_model, models.attention_write(any_model, LAYER)),
        Component("head", LAYER, 0): seen(any_model, models.head_input(any_model, LAYER), inputs=True),
        Component("neuron", LAYER, 0): seen(any_model, models.mlp_neurons(any_model, LAYER), inputs=True),
    }
    with torch.no_grad():
        _, cache = any_model.bridge.run_with_cache(IDS, names_filter=[c.tl_name for c in sites])
    for component, ours in sites.items():
        torch.testing.assert_close(cache[component.tl_name].reshape(ours.shape), ours, rtol=0, atol=1e-5)


def test_the_bridge_follows_edits_of_shared_parameters_and_names_the_copied_ones(any_model: Model) -> None:
    own = {p.untyped_storage().data_ptr() for p in any_model.hf.parameters()}
    foreign = [p for p in any_model.bridge.parameters() if p.untyped_storage().data_ptr() not in own]
    assert bool(foreign) == bool(any_model.copied_parameters) == (any_model.architecture.name == "gpt_neox")
    if any_model.copied_parameters:
        assert all(
            name.endswith(("query_key_value.weight", "query_key_value.bias")) for name in any_model.copied_parameters
        )
        assert len(any_model.copied_parameters) == 2 * any_model.n_layers
    with torch.no_grad():
        for name, parameter in any_model.hf.named_parameters():
            if name not in any_model.copied_parameters:
                parameter.mul_(1.3)
        torch.testing.assert_close(any_model.bridge(IDS), logits(any_model), rtol=0, atol=1e-5)


def test_a_fresh_bridge_shows_an_edit_of_copied_parameters(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("gpt_neox")
    _ = model.bridge
    with torch.no_grad():
        dict(model.hf.named_parameters())[model.copied_parameters[0]].mul_(2.0)
        assert not torch.allclose(model.bridge(IDS), logits(model), atol=1e-4)
        torch.testing.assert_close(build_bridge(model)(IDS), logits(model), rtol=0, atol=1e-6)


def test_the_bridge_tokenizes_as_the_model_does_and_works_without_a_tokenizer(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model()
    assert model.tokenizer is not None
    text = "Bram Norberg lives in the city of"
    assert model.bridge.to_tokens(text).tolist() == [model.tokenizer(text)["input_ids"]]
    assert wrap_model(model.hf).bridge(IDS).shape[:2] == IDS.shape


def test_a_saved_model_loads_as_it_was(any_model: Model, tmp_path: Path) -> None:
    _ = any_model.bridge
    save_model(any_model, tmp_path / "checkpoint")
    loaded = load_model(str(tmp_path / "checkpoint"))
    assert loaded.sha256 == any_model.sha256
    assert torch.equal(logits(loaded), logits(any_model))
    assert not loaded.hf.training
    assert loaded.tokenizer is not None
    assert any_model.tokenizer is not None
    text = "The favourite colour of Bram Lindqvist is amber"
    assert loaded.tokenizer(text)["input_ids"] == any_model.tokenizer(text)["input_ids"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "checkpoint").iterdir()} == {0o644}


def test_sizes_are_read_from_the_model(any_model: Model) -> None:
    grouped = any_model.architecture.name not in ("gpt2", "gpt_neo", "gpt_neox")
    wide = any_model.architecture.name in ("gemma", "gemma2", "gemma3_text", "qwen3")
    assert (any_model.n_layers, any_model.d_model, any_model.n_heads, any_model.d_mlp) == (3, 32, 4, 48)
    assert any_model.n_kv_heads == (2 if grouped else 4)
    assert any_model.d_head == (12 if wide else 8)
    assert (any_model.device.type, any_model.dtype) == ("cpu", torch.float32)


def test_the_hash_is_of_the_weights(tiny_model: Callable[..., Model]) -> None:
    model, twin = tiny_model(seed=1), tiny_model(seed=1)
    assert model.sha256 == twin.sha256 != tiny_model(seed=2).sha256
    with torch.no_grad():
        next(model.hf.parameters())[0, 0] += 1e-3
    assert model.sha256 != twin.sha256
    before = twin.sha256
    assert wrap_model(twin.hf.bfloat16()).sha256 != before


@pytest.fixture
def organism(tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled organism called "small": float16 weights with a card."""
    monkeypatch.setattr(checkpoints, "_weights_folder", lambda: tmp_path / "weights")
    folder = tmp_path / "weights" / "small"
    model = tiny_model("gpt2")
    save_model(wrap_model(model.hf.half(), model.tokenizer), folder)
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps({"sha256": sha256}))
    return folder


def test_a_bundled_organism_loads_by_name_in_float32(organism: Path, tiny_model: Callable[..., Model]) -> None:
    assert checkpoints.bundled_models() == ("small",)
    loaded = load_model("small")
    assert (loaded.name, loaded.dtype) == ("small", torch.float32)
    torch.testing.assert_close(logits(loaded), logits(tiny_model("gpt2")), rtol=0, atol=1e-3)
    assert load_model("small", dtype="float16").dtype == torch.float16


def test_a_bundled_organism_that_differs_from_its_card_is_refused(organism: Path) -> None:
    for card in ({"sha256": "0" * 64}, {}):
        (organism / "card.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match=r"'small': model\.safetensors has sha256 .* reinstall"):
            load_model("small")
    (organism / "card.json").write_text(json.dumps({"sha256": {"config.json": "0" * 64}}))
    with pytest.raises(ValueError, match=r"'small': config\.json has sha256 .* reinstall"):
        load_model("small")
    (organism / "card.json").unlink()
    with pytest.raises(ValueError, match="reinstall"):
        load_model("small")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal", "Did you mean 'small'. Bundled: small"),
        ("nobody/nothing", "no model 'nobody/nothing'"),
        ("./none", "no model folder './none'"),
        ("/none/of/it", "bundled model: small"),
        ("", "no model folder"),
    ],
)
@pytest.mark.usefixtures("organism")
def test_an_unknown_model_is_a_one_line_error(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_damaged_or_foreign_folder_is_a_one_line_error(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    save_model(tiny_model(), good)

    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            load_model(bad)
        assert "\n" not in str(caught.value)
        shutil.rmtree(bad)

    bad.mkdir()
    refused(FileNotFoundError, "no config.json")
    shutil.copytree(good, bad)
    (bad / "config.json").write_text("{")
    refused(ValueError, "cannot read the checkpoint")
    transformers.BloomConfig().save_pretrained(bad)
    refused(NotSupported, "'bloom' is not supported, supported: gpt2, ")
    shutil.copytree(good, bad)
    (bad / "model.safetensors").unlink()
    refused(ValueError, "cannot read the weights")
    shutil.copytree(good, bad)
    (bad / "model.safetensors").write_bytes(b"x" * 100)
    refused(ValueError, "cannot read the weights")
    shutil.copytree(good, bad)
    weights = load_file(bad / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    refused(ValueError, "incomplete: 1 weights are missing, e.g. model.layers.1.mlp.up_proj.weight")
    shutil.copytree(good, bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refused(ValueError, "cannot read the weights|incomplete")


def test_a_folder_without_a_tokenizer_gives_a_model_without_one(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    save_model(wrap_model(tiny_model().hf), tmp_path / "m")
    assert load_model(tmp_path / "m").tokenizer is None


def test_saving_never_overwrites_and_leaves_nothing_when_it_fails(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        save_model(model, tmp_path / "full")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(model.hf, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("text", ["m3", "a0.h4", "m0.n48", "a7"])
def test_a_component_the_model_does_not_have_is_refused(tiny_model: Callable[..., Model], text: str) -> None:
    with pytest.raises(ValueError, match="3 layers, 4 heads, 48 neurons"):
        component_parameters(tiny_model(), Component.parse(text))


def test_a_layer_the_model_does_not_have_is_refused(tiny_model: Callable[..., Model]) -> None:
    with pytest.raises(ValueError, match="layer: got 3, allowed: 0 to 2"):
        models.mlp(tiny_model(), 3)


def test_all_components_are_listed_once(tiny_model: Callable[..., Model]) -> None:
    listed = all_components(tiny_model(), ("mlp", "attention", "head", "neuron"))
    assert len(set(listed)) == len(listed) == 3 * (1 + 1 + 4 + 48)
