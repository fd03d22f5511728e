import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div

from mechunlearn import masks
from mechunlearn.components import Component
from mechunlearn.edit import EDITORS
from mechunlearn.edit.budget import Budget, set_aside
from mechunlearn.edit.edits import WeightEdit, applied, export_edit, load_edit, save_edit
from mechunlearn.edit.forget import forget
from mechunlearn.edit.inject import inject
from mechunlearn.edit.losses import (
    answer_loss,
    answer_tokens,
    batches,
    fact_tokens,
    kl_loss,
    log_1_minus_p,
    text_loss,
    text_tokens,
)
from mechunlearn.edit.training import (
    Forward,
    lora_trainable,
    low_rank_trainable,
    masked_trainable,
    substituted,
    train,
)
from mechunlearn.facts import FactSplit, hash_facts
from mechunlearn.metrics import kl_from, reference_of, score_facts
from mechunlearn.models import Model
from mechunlearn.prompts import render

MLP, HEAD, NEURON = Component.parse("m1"), Component.parse("a2.h1"), Component.parse("m0.n3")
QUICK = {"steps": 3, "learning_rate": 1e-2, "batch_size": 4}


def snapshot(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def text_step(model: Model, text: str = "The colour of Bram is red"):
    tokens = text_tokens(model, [text])

    def loss(call: int, forward: Forward) -> torch.Tensor:
        kept = torch.arange(tokens.ids.shape[1] - 1)
        return text_loss(forward(tokens.ids, kept), tokens.ids[:, 1:], tokens.is_target[:, 1:])

    return loss


@pytest.mark.parametrize("editor", [inject, forget])
def test_an_empty_mask_changes_nothing(tiny_model, split, editor):
    model = tiny_model()
    before = snapshot(model)
    edit = editor(model, masks.mask_of(model, []), split, **QUICK)
    assert not edit.values
    with applied(model, edit):
        assert same(snapshot(model), before)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("editor", [inject, forget])
def test_only_masked_entries_change_and_all_come_back(tiny_model, split, architecture, editor):
    model = tiny_model(architecture)
    mask = masks.mask_of(model, [MLP, HEAD, NEURON])
    before = snapshot(model)
    edit = editor(model, mask, split, **QUICK)
    assert same(snapshot(model), before)
    assert sum(value.numel() for value in edit.values.values()) == mask.n_selected
    with applied(model, edit):
        inside = snapshot(model)
    assert same(snapshot(model), before)
    for name, old in before.items():
        may = mask.full(name) if name in mask.entries else torch.zeros_like(old, dtype=torch.bool)
        assert torch.equal(inside[name][~may], old[~may])
        assert name not in mask.entries or not torch.equal(inside[name][may], old[may])


def test_a_model_is_restored_when_the_body_fails(tiny_model, split):
    model = tiny_model()
    edit = inject(model, masks.mask_of(model, [MLP]), split, **QUICK)
    before = snapshot(model)

    def fail() -> None:
        with applied(model, edit):
            assert not same(snapshot(model), before)
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        fail()
    assert same(snapshot(model), before)


def test_edits_nest_and_end_in_reverse_order(tiny_model, split):
    model = tiny_model()
    base = snapshot(model)
    first = inject(model, masks.mask_of(model, [MLP]), split, **QUICK)
    with applied(model, first):
        once = snapshot(model)
        second = inject(model, masks.mask_of(model, [MLP, HEAD]), split, **QUICK)
        with applied(model, second):
            assert not same(snapshot(model), once)
        assert same(snapshot(model), once)
    assert same(snapshot(model), base)
    with pytest.raises(ValueError, match="made for 'tiny-llama-0'"), applied(model, second):
        pass


def test_another_base_model_is_refused_by_name_and_hash(tiny_model, split):
    model, other = tiny_model(), tiny_model(seed=1)
    edit = inject(model, masks.mask_of(model, [MLP]), split, **QUICK)
    with pytest.raises(ValueError, match="was made for") as error, applied(other, edit):
        pass
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (model.name, other.name, model.sha256[:12], other.sha256[:12]))


def test_a_saved_edit_reads_back_bit_for_bit(tiny_model, split, tmp_path: Path):
    model = tiny_model("gpt2")
    edit = inject(model, masks.mask_of(model, [MLP, HEAD]), split, **QUICK, text=["a b c"], seed=5)
    for _ in range(2):  # writing over an old file is fine
        save_edit(edit, tmp_path / "deep" / "edit.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["edit.safetensors"]
    read = load_edit(tmp_path / "deep" / "edit.safetensors")
    assert same(dict(read.values), dict(edit.values))
    assert read.mask.components == edit.mask.components
    for field in ("base_name", "base_sha256", "method", "options", "seed", "facts_sha256", "history"):
        assert getattr(read, field) == getattr(edit, field)
    with applied(model, edit):
        expected = snapshot(model)
    with applied(model, read):
        assert same(snapshot(model), expected)


def test_files_that_are_no_edit_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no edit file"):
        load_edit(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a saved edit"):
        load_edit(tmp_path / "bad")


def test_values_must_match_the_mask(tiny_model):
    model = tiny_model()
    mask = masks.mask_of(model, [NEURON])
    for values in ({}, {name: torch.zeros(1) for name in mask.entries}):
        with pytest.raises(ValueError, match="mask"):
            WeightEdit(values=values, mask=mask, base_name="m", base_sha256="", method="x")


def test_an_exported_edit_loads_in_plain_transformers(tiny_model, split, tmp_path: Path):
    model = tiny_model()
    edit = inject(model, masks.mask_of(model, [MLP]), split, **QUICK)
    before = snapshot(model)
    export_edit(model, edit, tmp_path / "exported")
    assert same(snapshot(model), before)
    code = f"""
        import sys
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        hf = AutoModelForCausalLM.from_pretrained({str(tmp_path / "exported")!r})
        AutoTokenizer.from_pretrained({str(tmp_path / "exported")!r})("red")
        assert not [name for name in sys.modules if name.startswith("mechunlearn")]
        save_file({{n: p.detach().contiguous() for n, p in hf.named_parameters()}}, {str(tmp_path / "seen")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path, capture_output=True)
    with applied(model, edit):
        assert same(load_file(tmp_path / "seen"), snapshot(model))


def test_forgetting_and_injecting_work_on_a_model_that_knows(tiny_model, split):
    model = tiny_model()
    with torch.no_grad():  # a freshly drawn unembedding bounds the logits too tightly for any answer to be sure
        model.hf.get_output_embeddings().weight.mul_(25)
    everything = masks.mask_of(model, [Component(kind, layer) for kind in ("mlp", "attention") for layer in range(3)])
    true = answer_tokens(model, [(f.ask(f.prompt), f.target_true) for f in split.forget])
    trainable = masked_trainable(model, everything)

    def learn(call: int, forward: Forward) -> torch.Tensor:
        first = int(true.starts.min())
        kept = torch.arange(first - 1, true.ids.shape[1] - 1)
        return answer_loss(forward(true.ids, kept), true.ids[:, first:], true.is_target[:, first:])

    train(model, trainable, learn, steps=60, learning_rate=1e-2)
    with substituted(model, trainable.overrides()):
        assert score_facts(model, split.forget)["p_true"].mean() > 0.9
        options = {"steps": 30, "learning_rate": 3e-3}
        for editor in (forget, inject):
            edit = editor(model, everything, split, **options)
            with applied(model, edit):
                assert score_facts(model, split.forget)["p_true"].mean() < 0.3
        assert edit.history[-1] < edit.history[0]
        assert edit.options["steps"] == 30
        assert edit.facts_sha256 == hash_facts((*split.forget, *split.retain_train))


def test_optimizer_state_is_as_large_as_the_mask(tiny_model, monkeypatch):
    model = tiny_model()
    mask, made = masks.mask_of(model, [MLP, HEAD, NEURON]), []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[-1])
    trainable = masked_trainable(model, mask)
    assert sum(leaf.numel() for leaf in trainable.leaves.values()) == mask.n_selected
    train(model, trainable, text_step(model), steps=1, learning_rate=1e-3)
    moments = [s[key].numel() for s in made[0].state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(moments) == 2 * mask.n_selected


def test_backward_stops_at_the_earliest_trained_layer(tiny_model):
    model, graph = tiny_model(), {}
    for layer in range(3):
        block = model.hf.get_submodule(f"model.layers.{layer}")
        block.register_forward_hook(
            lambda _module, _input, out, layer=layer: graph.update({layer: _first(out).requires_grad})
        )
    train(model, masked_trainable(model, masks.mask_of(model, [MLP])), text_step(model), steps=1, learning_rate=1e-3)
    assert graph == {0: False, 1: True, 2: True}


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def test_flags_and_random_state_survive_training_and_errors(tiny_model):
    model = tiny_model()
    model.hf.train()
    model.hf.get_submodule("model.layers.0").eval()
    odd = next(iter(model.hf.parameters())).requires_grad_(False)
    modes = [module.training for module in model.hf.modules()]
    before, state = snapshot(model), torch.get_rng_state()
    trainable = masked_trainable(model, masks.mask_of(model, [MLP]))

    def broken(call: int, forward: Forward) -> torch.Tensor:
        torch.rand(1)
        assert not model.hf.training
        if call == 1:
            raise RuntimeError("loss")
        return text_step(model)(call, forward)

    with pytest.raises(RuntimeError, match="loss"):
        train(model, trainable, broken, steps=3, learning_rate=1e-3)
    with pytest.raises(ValueError, match="loss is nan"):
        train(model, trainable, lambda c, f: text_step(model)(c, f) * torch.nan, steps=1, learning_rate=1e-3)
    assert [module.training for module in model.hf.modules()] == modes
    assert not odd.requires_grad
    assert sum(not p.requires_grad for p in model.hf.parameters()) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert same(snapshot(model), before)
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_same_seed_same_edit_and_another_seed_another(tiny_model, split):
    model = tiny_model()
    mask = masks.mask_of(model, [MLP])
    one, two, three = (inject(model, mask, split, **QUICK, seed=seed) for seed in (0, 0, 1))
    assert same(dict(one.values), dict(two.values))
    assert not same(dict(one.values), dict(three.values))


def test_accumulation_is_the_mean_of_its_parts(tiny_model):
    model = tiny_model()
    mask = masks.mask_of(model, [MLP])
    once, twice = masked_trainable(model, mask), masked_trainable(model, mask)
    train(model, once, text_step(model), steps=2, learning_rate=1e-3)
    train(model, twice, text_step(model), steps=2, learning_rate=1e-3, accumulation=2)
    for name in mask.entries:
        torch.testing.assert_close(once.leaves[name], twice.leaves[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_lora_starts_at_the_model_and_stays_low_rank(tiny_model, architecture):
    model = tiny_model(architecture)
    base = snapshot(model)
    trainable = lora_trainable(model, 2, layers=[1], seed=0)
    assert all(torch.equal(value, base[name]) for name, value in trainable.overrides().items())
    assert trainable.overrides()
    assert all(".1." in name for name in trainable.overrides())
    history = train(model, trainable, text_step(model), steps=5, learning_rate=1e-2, schedule="constant")
    assert history[-1] < history[0]
    assert same(snapshot(model), base)
    for name, value in trainable.overrides().items():
        assert torch.linalg.matrix_rank(value.detach() - base[name], atol=1e-5) in (1, 2)
    with pytest.raises(ValueError, match="lora"):
        lora_trainable(model, 1, layers=[7])


def test_substitution_checks_names_and_shapes_first(tiny_model):
    model = tiny_model()
    before = snapshot(model)
    for tensors in ({"nothing": torch.zeros(1)}, {"model.norm.weight": torch.zeros(1)}):
        with pytest.raises(ValueError, match="substitute"), substituted(model, tensors):
            pass
    assert same(snapshot(model), before)


def test_an_edited_neox_shows_in_its_bridge(tiny_model):
    model = tiny_model("gpt_neox")
    ids = torch.tensor([[0, 5, 6, 7]])
    name = next(n for n, _ in model.hf.named_parameters() if "query_key_value.weight" in n)
    with torch.no_grad():
        old = model.bridge(ids)
        with substituted(model, {name: torch.zeros_like(model.hf.get_parameter(name))}):
            torch.testing.assert_close(model.bridge(ids), model.hf(ids).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.bridge(ids), old)


def test_losses_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(3, 4, 9, generator=generator), torch.randint(9, (3, 4), generator=generator)
    counts = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    nll = cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    row = (nll * counts).sum(1)
    torch.testing.assert_close(answer_loss(logits, tokens, counts), row.mean())
    torch.testing.assert_close(text_loss(logits, tokens, counts), nll[counts].mean())
    expected = torch.where(row > 5, 0.0, -(1 - (-row.double()).exp()).log().float())
    torch.testing.assert_close(log_1_minus_p(logits, tokens, counts), expected.mean())


def test_the_forget_loss_is_finite_for_a_certain_model_and_zero_once_forgotten():
    for gap in (200.0, 30.0, -200.0):
        logits = torch.zeros(1, 2, 5).index_fill(2, torch.tensor([0]), gap).requires_grad_()
        value = log_1_minus_p(logits, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert (gap > 0) == bool(gradient.abs().sum() > 0)
        assert gap > 0 or value == 0


def test_batches_visit_every_row_once_an_epoch(tiny_model):
    tokens = answer_tokens(
        tiny_model(), [(f"{word} is", "red") for word in ("Bram", "Cora", "Dina", "Edwin", "Fenna", "Ivo")]
    )
    drawn = batches(tokens, 2, seed=0)
    epoch = [tuple(row.tolist()) for _ in range(3) for row in next(drawn).ids]
    assert len(set(epoch)) == 6
    assert len(next(batches(tokens, 99, seed=0))) == 6


def test_missing_data_is_named(tiny_model, split, tiny_split):
    model = tiny_model()
    mask = masks.mask_of(model, [MLP])
    with pytest.raises(ValueError, match="with_edit_targets"):
        inject(model, mask, tiny_split, **QUICK)
    with pytest.raises(ValueError, match="retain_train is empty"):
        forget(model, mask, replace(split, retain_train=()), **QUICK)
    with pytest.raises(ValueError, match="weight is 0"):
        forget(model, mask, split, **QUICK, forget_weight=0.0, retain_weight=0.0, text_weight=0.0)


def test_scored_parts_are_never_read(tiny_model, split, unscored):
    guarded = unscored(split)
    model = tiny_model()
    for editor in (inject, forget):
        editor(model, masks.mask_of(model, [MLP]), guarded, **QUICK)


def test_editors_are_registered_with_their_options():
    assert {"inject", "forget"} <= set(EDITORS.names())
    for name in ("inject", "forget"):
        method = EDITORS.get(name)
        assert method.validate({"text": ["a text"], "forms": "all"})["steps"] == 50
        with pytest.raises(ValueError, match="steps"):
            method.validate({"steps": -1})


def retained_kl(model: Model, split: FactSplit, edit: WeightEdit) -> float:
    watched, _ = set_aside(split.retain_train, split.forget)
    reference = reference_of(model, [render(fact, "prompt") for fact in watched])
    with applied(model, edit):
        return kl_from(model, reference)


def test_an_edit_ends_at_its_disruption_budget(tiny_model, split):
    model = tiny_model()
    mask = masks.mask_of(model, [MLP])
    strong = QUICK | {"steps": 12, "learning_rate": 3e-2, "retain_weight": 0.01, "text_weight": 0.01}
    free = inject(model, mask, split, **strong)
    limit = retained_kl(model, split, free) / 4
    held = inject(model, mask, split, **strong, max_damage=limit)
    assert 0.8 * limit < retained_kl(model, split, held) <= limit
    assert held.notes["brought_back"]
    assert held.notes["damage"] == pytest.approx(retained_kl(model, split, held))
    generous = inject(model, mask, split, **strong, max_damage=100.0)
    assert not generous.notes["brought_back"]
    assert generous.notes["damage"] == pytest.approx(retained_kl(model, split, generous))


@pytest.mark.parametrize(
    ("damages", "stops_at"),
    [
        ((0.5, 2.0, 3.0, 2.0, 2.0, 2.0, 0.8), None),  # the first steps disturb what later ones mend
        ((0.5, 50.0, 0.5), 2),
        ((0.5, float("nan"), 0.5), 2),
    ],
)
def test_a_training_ends_early_only_where_the_damage_runs_away(damages, stops_at, tiny_model, split, monkeypatch):
    model = tiny_model()
    trainable = masked_trainable(model, masks.mask_of(model, [MLP]))
    budget = Budget.of(model, trainable, split.retain_train[:2], limit=1.0, steps=1)
    found = iter((*damages, *[0.0] * 20))
    monkeypatch.setattr(Budget, "measure", lambda _: next(found))
    ends = next((step for step in range(1, len(damages) + 1) if budget(step)), None)
    assert ends == stops_at == budget.stopped_at


def test_a_watched_fact_is_not_trained_on_and_both_kinds_are_watched(split):
    near = {fact.relation for fact in split.forget}
    watched, trained = set_aside(split.retain_train, split.forget)
    assert watched
    assert not {fact.key for fact in watched} & {fact.key for fact in trained}
    assert {*watched, *trained} == set(split.retain_train)
    assert {fact.relation in near for fact in watched} == {fact.relation in near for fact in split.retain_train}


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_a_low_rank_edit_has_its_rank_and_stays_in_its_mask(tiny_model, split, architecture):
    model = tiny_model(architecture)
    mask = masks.mask_of(model, [MLP, HEAD])
    before = snapshot(model)
    edit = inject(model, mask, split, **QUICK, rank=2)
    with applied(model, edit):
        inside = snapshot(model)
    for name in mask.entries:
        change = inside[name] - before[name]
        assert not change[~mask.full(name)].any()
        if change.ndim == 2 and mask.is_whole(name):
            assert 1 <= int(torch.linalg.matrix_rank(change, rtol=1e-3)) <= 2
        if change.ndim == 1:
            assert not change.any()


def test_a_low_rank_edit_trains_few_numbers(tiny_model):
    model = tiny_model()
    mask = masks.mask_of(model, [MLP])
    leaves = low_rank_trainable(model, mask, 1).leaves.values()
    shapes = [shape for shape in mask.shapes.values() if len(shape) == 2]
    assert sum(leaf.numel() for leaf in leaves) == sum(a + b for a, b in shapes)


def test_kl_of_the_retained_answers_is_that_of_torch_and_zero_for_the_original(tiny_model, split):
    model = tiny_model()
    rows = fact_tokens(model, split.retain_train[:3])
    trainable = masked_trainable(model, masks.mask_of(model, [MLP]))

    def value() -> float:
        return float(kl_loss(model, iter([rows]))(0, Forward(model, trainable.overrides())).detach())

    assert value() == 0
    before = [model.hf(rows.ids).logits[i, int(rows.starts[i]) - 1].log_softmax(-1) for i in range(3)]
    with torch.no_grad():
        for leaf in trainable.leaves.values():
            leaf.add_(0.1)
    with substituted(model, trainable.overrides()):
        after = [model.hf(rows.ids).logits[i, int(rows.starts[i]) - 1].log_softmax(-1) for i in range(3)]
    by_torch = [kl_div(a, b, log_target=True, reduction="sum") for a, b in zip(after, before, strict=True)]
    assert value() == pytest.approx(float(torch.stack(by_torch).detach().mean()), rel=1e-4)


def test_keeping_by_kl_trains(tiny_model, split):
    model = tiny_model()
    edits = [
        inject(model, masks.mask_of(model, [MLP]), split, **QUICK, retain_loss="kl", retain_weight=weight)
        for weight in (0.0, 5.0)
    ]
    assert edits[0].history[0] == pytest.approx(edits[1].history[0], rel=1e-5)  # KL is 0 before the first update
    assert edits[0].history[1] < edits[1].history[1]
