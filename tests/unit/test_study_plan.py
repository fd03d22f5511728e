"""The dry run of the study: sets and sizes against the paper's runs, bytes and operations against counted ones."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mechunlearn.architectures import NotSupported
from mechunlearn.bench.memory import peak_bytes
from mechunlearn.checkpoints import model_without_weights
from mechunlearn.cli import app
from mechunlearn.components import Component
from mechunlearn.edit.inject import inject
from mechunlearn.edit.training import Forward, low_rank_trainable, masked_trainable
from mechunlearn.facts import with_edit_targets
from mechunlearn.masks import mask_of
from mechunlearn.models import all_components, wrap_model
from mechunlearn.study.dry_run import dry_run
from mechunlearn.study.memory import Batch, activation_bytes, logit_bytes, training_memory
from mechunlearn.study.operations import training_flops
from mechunlearn.study.planned_arms import LEADING, PLANNED, resolve_arms, short
from mechunlearn.study.settings import load_study, study_models, study_presets

REAL = ("pythia-2.8b", "gemma-7b", "gemma-2-9b", "llama-3-8b")
PRESETS = Path(__file__).parents[2] / "mechunlearn" / "presets"


@cache
def bare(name):
    return model_without_weights(PRESETS / "models" / "configs" / f"{name}.json", dtype="bfloat16")


def arms_of(preset, name):
    study, about = load_study(preset, model=name)
    arms = resolve_arms(bare(name), study, about.tasks[study.task])
    return {arm.name: arm for arm in arms}, about.tasks[study.task]


def test_a_model_of_a_configuration_has_the_published_number_of_parameters_and_no_storage():
    published = {"pythia-2.8b": 2_775_208_960, "gemma-7b": 8_537_680_896, "gemma-2-9b": 9_241_705_984,
                 "llama-3-8b": 8_030_261_248}  # fmt: skip
    for name, n in published.items():
        parameters = list(bare(name).hf.parameters())
        assert sum(p.numel() for p in parameters) == n, name
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters)


@pytest.mark.parametrize(
    ("preset", "model", "arm", "entries"),
    [  # reference 3.2, 3.6 and 3.7: what the paper's runs trained; the last ones are stated in millions
        ("sports-athletes-16", "gemma-7b", "lookup-probe", 1_358_954_496),
        ("sports-athletes-16", "gemma-2-9b", "lookup-probe", 770_703_360),
        ("sports-whole", "llama-3-8b", "lookup-probe", 704_643_072),
        ("sports-athletes-64", "gemma-2-9b", "all-mlps", 6.474e9),
        ("sports-athletes-64", "gemma-2-9b", "nonlocalized", 8.324e9),
        ("sports-athletes-64", "gemma-7b", "causal-tracing", 1.485e9),
        ("sports-athletes-64", "gemma-7b", "attribution-patching", 1.384e9),
        ("sports-whole", "gemma-2-9b", "causal-tracing", 793e6),
        ("sports-whole", "gemma-2-9b", "attribution-patching", 859e6),
        ("sports-whole", "llama-3-8b", "causal-tracing", 713e6),
        ("sports-whole", "llama-3-8b", "attribution-patching", 830e6),
        ("counterfact-16", "gemma-7b", "lookup-paths", 1.812e9),
        ("counterfact-64", "gemma-7b", "lookup-paths", 1.132e9),
        ("counterfact-16", "gemma-2-9b", "lookup-paths", 771e6),
        ("counterfact-64", "gemma-2-9b", "lookup-paths", 1.233e9),
        ("counterfact-16", "llama-3-8b", "lookup-paths", 705e6),
        ("counterfact-64", "llama-3-8b", "lookup-paths", 705e6),
    ],
)
def test_the_published_sets_have_the_published_sizes(preset, model, arm, entries):
    found = arms_of(preset, model)[0][arm].mask.n_selected
    exact = isinstance(entries, int)
    digit = 1e6 if entries >= 1e9 or not exact else 1
    assert found == entries if exact else abs(found - entries) <= digit / 2


@pytest.mark.parametrize("preset", [name for name in study_presets() if name != "quick"])
@pytest.mark.parametrize("name", [name for name in study_models() if name != "atlas-quick"])
def test_every_preset_resolves_on_every_model(preset, name):
    study, about = load_study(preset, model=name)
    tables = dry_run(study, about)
    arms, memory, hours = tables["arms"].set_index("arm"), tables["memory"].set_index("of"), tables["hours"]
    assert tuple(arms.index) == PLANNED
    exact = [arm for arm in PLANNED if arm.endswith("-mlps") and arm != "all-mlps"] + [LEADING[study.task]]
    assert (arms.loc[exact, "of the budget"] == 1).all()
    assert 0.8 < arms.loc["random", "of the budget"] <= 1
    assert arms.loc["nonlocalized", "share"] == 1
    assert memory.loc[list(PLANNED), "total"].le(80).all(), "it is to run on one card"
    assert {"relearning", "quantization", "probing"} <= set(memory.index)
    assert (memory["checkpointed"] <= memory["total"]).all()
    assert hours["hours"].iloc[:-1].sum() == pytest.approx(hours["hours"].iloc[-1])
    assert (hours["hours"] > 0).all()
    assert hours["hours"].iloc[-1] < 24
    if name != "atlas":
        names = dict(bare(name).hf.named_parameters())
        for arm in arms_of(preset, name)[0].values():
            assert all(names[key].shape == shape for key, shape in arm.mask.shapes.items())


def test_a_preset_of_other_size_takes_the_sets_and_values_published_for_it():
    few, many = (load_study(f"counterfact-{n}", model="gemma-7b")[1].tasks["counterfact"] for n in (16, 64))
    assert (few.n_mlps, many.n_mlps) == (8, 5)
    assert few.start["lookup-paths"] == [5e-6, 0.1]
    assert many.start["lookup-paths"] == [1e-5, 2.0]
    assert few.trials == many.trials
    assert all(pair in few.trials for task in (few, many) for pair in task.start.values())


def test_layers_are_named_in_runs():
    assert short([Component.parse(name) for name in ("m6", "a3", "m2", "m3", "m4")]) == "a3 m2-4,6"


def broken(tmp_path, change, model="gemma-2-9b"):
    text = (PRESETS / "models" / f"{model}.toml").read_text().replace("configs/", f"{PRESETS}/models/configs/")
    path = tmp_path / "mine.toml"
    path.write_text(change(text))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"m8"]', '"m88"]', "arm causal-tracing-mlps: component m88: the model has 42 layers"),
        ("causal-tracing-mlps = [", "causal-traceing-mlps = [", "Did you mean 'causal-tracing-mlps'"),
        ('lookup-probe = ["m2", ', "lookup-probe = [", "as n_mlps says"),
        ('"a25", "a33", "m28"', '"a25", "a33", "a34", "a35", "m28"', "less than one sublayer above"),
        ("n_mlps = 5", "n_mlps = 42", "fewer than the model's 42 layers"),
        ("mdl = false", "mdll = false", "unknown option"),
        ("lookup-probe = [1e-5, 1.0]", "lookup-probe = [1e-5, 1.5]", "got [1e-05, 1.5], allowed: one of trials"),
        ("lookup-paths = [5e-5, 2.0]", "lookup-paths = [5e-5, 2.5]", "'lookup-paths': got [5e-05, 2.5], allowed"),
        ("[quick.probing]", "[quick.prodding]", "Did you mean 'probing'"),
        ('source = "sports"', 'source = "sportz"', "got 'sportz', allowed: a bundled data set"),
        ('relation = "plays_sport"', 'relation = "plays"', "allowed: plays_sport"),
        ("gemma-2-9b.json", "gemma-9-2b.json", "no configuration"),
        ('config = "', '# config = "', "give `config`"),
    ],
)
def test_a_mistake_in_a_models_file_is_one_line(tmp_path, old, new, message):
    path = broken(tmp_path, lambda text: text.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        dry_run(*load_study("sports-athletes-16", model=path))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_wrong_answer_that_no_fact_could_have_is_refused(tmp_path):
    path = broken(tmp_path, lambda text: text.replace('target = "golf"', 'target = "chess"'))
    with pytest.raises(ValueError, match=r"target: got 'chess', allowed for .*golf"):
        dry_run(*load_study("sports-whole", model=path))


def test_a_configuration_that_is_none_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (("{", "not the configuration"), ('{"hidden_size": 8}', "no model_type")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            model_without_weights(path)
    path.write_text('{"model_type": "bloom"}')
    with pytest.raises(NotSupported, match="architecture 'bloom' is not supported, supported: gpt2"):
        model_without_weights(path)


def test_the_command_prints_every_arm():
    shown = CliRunner().invoke(app, ["study", "plan", "sports-whole", "--model", "llama-3-8b", "--card", "40"])
    assert shown.exit_code == 0
    assert all(f" {arm} " in shown.output for arm in PLANNED)
    assert "704643072" in shown.output


def small(tmp_path, kind="llama", **sizes):
    """A model of two or more blocks, real and not a shell, so that it can be run."""
    config = {"model_type": kind, "vocab_size": 2000, "hidden_size": 256, "num_hidden_layers": 4,
              "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 64}  # fmt: skip
    config |= {} if kind == "gpt_neox" else {"num_key_value_heads": 2, "head_dim": 64}
    path = tmp_path / f"{kind}.json"
    path.write_text(json.dumps(config | sizes))
    model = model_without_weights(path, dtype="bfloat16")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = type(model.hf)(model.hf.config).to(torch.bfloat16)
    return wrap_model(hf)


def test_memory_is_what_one_counts_by_hand(tmp_path):
    path = tmp_path / "config.json"
    config = {"model_type": "llama", "vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 3,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 10,
              "tie_word_embeddings": True}  # fmt: skip
    path.write_text(json.dumps(config))
    model = model_without_weights(path, dtype="bfloat16")
    block = 3 * 8 * 10 + 2 * 8 * 8 + 2 * 8 * 4 + 2 * 8  # MLP; query and output; key and value; two norms
    batch = Batch(tokens=50, kept=7, width=20)
    token = 4 * 8 * 2 + 2 * 2 * (2 + 1) * 4 + 2 * (2 * 8 + 4 * 10) + 6 * 2 * 2 * 20
    gb = training_memory(model, mask_of(model, [Component("mlp", 1)]), batch)
    expected = {
        "weights": 2 * (3 * block + 100 * 8 + 8), "trained": 16 * 240, "copies": 8 * 240,
        "activations": 2 * 50 * token, "logits": 12 * 7 * 100,
    }  # fmt: skip
    assert {name: round(gb[name] * 1e9) for name in expected} == expected
    assert round(gb["total"] * 1e9) == sum(expected.values())
    checkpointed = sum(expected.values()) - 50 * token + 2 * 50 * 2 * 8
    assert round(gb["checkpointed"] * 1e9) == checkpointed
    low = training_memory(model, mask_of(model, [Component("mlp", 1)]), batch, rank=3)
    assert round(low["trained"] * 1e9) == 16 * 3 * 3 * (8 + 10)
    assert round(low["copies"] * 1e9) == 8 * 3 * 3 * (8 + 10) + 4 * 240


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("names", [("m0",), ("a1", "m2"), ("a0", "m0", "a1", "m1", "a2", "m2", "a3", "m3")])
def test_activations_and_logits_are_bounded_from_above_and_not_wildly(kind, names, tmp_path):
    model = small(tmp_path, kind)
    mask = mask_of(model, [Component.parse(name) for name in names])
    model.hf.requires_grad_(False)
    overrides = masked_trainable(model, mask).overrides()
    ours = [*model.hf.parameters(), *model.hf.buffers(), *overrides.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in ours}
    saved = {}  # keeps each tensor alive, so that no address is used twice

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(4 * 32).reshape(4, 32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Forward(model, overrides)(ids, torch.arange(26, 32)).logsumexp(-1).mean()
    counted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    batch = Batch(tokens=4 * 32, kept=4 * 6, width=32)
    bound = activation_bytes(model, batch, min(c.layer for c in mask.components)) + logit_bytes(model, batch)
    assert counted <= bound <= 2.5 * counted


@pytest.mark.parametrize("rank", [None, 8])
def test_the_peak_of_a_real_edit_is_bounded_from_above_and_not_wildly(rank, tmp_path, tokenizer, tiny_split):
    hf = small(tmp_path, vocab_size=len(tokenizer)).hf
    model = wrap_model(hf, tokenizer)
    mask = mask_of(model, all_components(model))
    retain = tiny_split.retain_train[:16]
    split = type(tiny_split)(
        forget_shown=with_edit_targets(tiny_split.forget_shown), forget_hidden=(), attack_dev=(), retain_train=retain,
        retain_test=(),
    )  # fmt: skip
    options = {"steps": 3, "batch_size": 8, "learning_rate": 1e-5, "max_damage": 1e-6, "rank": rank, "seed": 0}
    peak = peak_bytes(lambda: inject(model, mask, split, **options), model.device)
    gb = training_memory(model, mask, Batch.of(8), rank=rank)
    bound = (gb["total"] - gb["weights"]) * 1e9
    assert peak <= bound <= 2 * peak


@pytest.mark.parametrize("names", [("m0",), ("m3",), ("a1", "m2")])
def test_operations_of_a_step_are_those_that_torch_counts(names, tmp_path):
    model = small(tmp_path)
    mask = mask_of(model, [Component.parse(name) for name in names])
    model.hf.requires_grad_(False)
    trainable = masked_trainable(model, mask)
    ids = torch.arange(4 * 32).reshape(4, 32)
    with FlopCounterMode(display=False) as counter:
        Forward(model, trainable.overrides())(ids, torch.arange(31, 32)).logsumexp(-1).mean().backward()
    counted = counter.get_total_flops()
    # attention patterns are not ours; what the first trained sublayer reads needs no gradient
    assert 0.95 * counted <= training_flops(model, mask, Batch(tokens=4 * 32, kept=4, width=32)) <= 1.2 * counted


def test_low_rank_updates_count_as_many_numbers_as_they_have(tmp_path):
    model = small(tmp_path)
    mask = mask_of(model, [Component("mlp", 1)])
    leaves = low_rank_trainable(model, mask, 4).leaves.values()
    gb = training_memory(model, mask, Batch.of(8), rank=4)
    assert math.isclose(gb["trained"], 16e-9 * sum(leaf.numel() for leaf in leaves))
