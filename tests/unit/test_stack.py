"""Edits one after another: applying, undoing, merging, saving, and what drift says about them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mechunlearn.components import Component
from mechunlearn.edit.edits import WeightEdit, applied, load_edit, save_edit
from mechunlearn.edit.inject import inject
from mechunlearn.edit.sequential import edit_sequentially
from mechunlearn.edit.stack import EditStack
from mechunlearn.edit.stack_files import load_stack, save_stack
from mechunlearn.evaluate.drift import drift
from mechunlearn.facts import FactSet, FactSplit, split_facts, with_edit_targets
from mechunlearn.masks import ParameterMask, mask_of, n_shared
from mechunlearn.metrics import kl_from, perplexity, reference_of, score_facts
from mechunlearn.models import Model, wrap_model
from mechunlearn.selection import select_entries
from mechunlearn.splits import held_out, in_sequence, load_splits, save_splits, split_after

MLP, OTHER, HEAD = Component("mlp", 1), Component("mlp", 2), Component("head", 1, 2)
DTYPES = (torch.float32, torch.bfloat16)


def snapshot(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def drawn_edit(model: Model, mask: ParameterMask, seed: int) -> WeightEdit:
    """New random values of the masked entries of the model as it is."""
    generator = torch.Generator().manual_seed(seed)
    return WeightEdit(
        values={n: torch.randn(int(mask.full(n).sum()), generator=generator).to(model.dtype) for n in mask.entries},
        mask=mask, base_name=model.name, base_sha256=model.sha256, method=f"drawn-{seed}", seed=seed,
        history=(1.0 * seed,),
    )  # fmt: skip


def in_dtype(model: Model, dtype: torch.dtype) -> Model:
    return wrap_model(model.hf.to(dtype), model.tokenizer, name=model.name)


def masks_for(model: Model) -> list[ParameterMask]:
    """Disjoint from the first, overlapping with it, and rows of it."""
    scores = {name: torch.rand(shape) + 0.1 for name, shape in mask_of(model, [MLP]).shapes.items()}
    return [
        mask_of(model, [MLP]),
        mask_of(model, [OTHER, HEAD]),
        mask_of(model, [MLP, HEAD], matrices=("out", "q")),
        select_entries(model, scores, budget=200, granularity="row"),
    ]


def stack_of(model: Model) -> EditStack:
    stack = EditStack.of(model)
    for seed, mask in enumerate(masks_for(model), start=1):
        with stack.applied(model):
            edit = drawn_edit(model, mask, seed)
        stack = stack.push(model, edit)
    return stack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_a_stack_applies_as_its_edits_nested_and_is_undone_exactly(tiny_model, architecture, dtype):
    model = in_dtype(tiny_model(architecture), dtype)
    base, stack = snapshot(model), stack_of(model)
    assert n_shared(stack.edits[0].mask, stack.edits[1].mask) == 0 < n_shared(stack.edits[0].mask, stack.edits[2].mask)
    states = []
    for n in range(len(stack) + 1):
        with stack.applied(model, n):
            states.append(snapshot(model))
        assert same(snapshot(model), base)
    assert same(states[0], base)
    assert not any(same(a, b) for i, a in enumerate(states) for b in states[:i])
    for n, edit in enumerate(stack.edits):
        with stack.applied(model, n), applied(model, edit):
            assert same(snapshot(model), states[n + 1])
        with stack.undo(len(stack) - n).applied(model):
            assert same(snapshot(model), states[n])
    with stack.applied(model):
        assert same(snapshot(model), states[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_the_merged_edit_is_the_stack_bit_for_bit(tiny_model, architecture, dtype):
    model = in_dtype(tiny_model(architecture), dtype)
    stack = stack_of(model)
    for n in range(len(stack) + 1):
        shorter = stack.undo(len(stack) - n)
        merged = shorter.merge()
        with shorter.applied(model):
            expected = snapshot(model)
        with applied(model, merged):
            assert same(snapshot(model), expected)
        assert merged.mask.n_selected == sum(value.numel() for value in merged.values.values())
        assert merged.history == tuple(range(1, n + 1))
    first, second, *_ = (edit.mask.n_selected for edit in stack.edits)  # they share nothing
    assert first + second <= stack.merge().mask.n_selected < sum(e.mask.n_selected for e in stack.edits)
    assert [e["method"] for e in stack.merge().options["edits"]] == [f"drawn-{i}" for i in range(1, 5)]


def test_a_stack_restores_the_model_when_the_body_or_an_edit_fails(tiny_model):
    model = tiny_model()
    base, stack = snapshot(model), stack_of(model)

    def fail() -> None:
        with stack.applied(model):
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        fail()
    assert same(snapshot(model), base)
    swapped = replace(stack, edits=(stack.edits[0], stack.edits[2], stack.edits[1]))
    message = "stack: edit 2 of 3 does not fit its place: edit 'drawn-3' was made"
    with pytest.raises(ValueError, match=message) as error, swapped.applied(model):
        pass
    assert "\n" not in str(error.value)
    assert same(snapshot(model), base)


def test_edits_that_do_not_fit_are_refused_in_one_line(tiny_model):
    model, other = tiny_model(), tiny_model(seed=1)
    stack = stack_of(model)
    on_base = drawn_edit(model, mask_of(model, [MLP]), 9)
    with pytest.raises(ValueError, match=r"got edit 'drawn-9' made on .* allowed: one made on .* with the 4 edits"):
        stack.push(model, on_base)
    with pytest.raises(ValueError, match="stack: edit 1 of 4 does not fit"), stack.applied(other):
        pass
    with pytest.raises(ValueError, match="got a first edit 'drawn-9' made on"):
        EditStack(base_name="other", base_sha256=other.sha256, edits=(on_base,))
    for n in (-1, 5):
        with pytest.raises(ValueError, match="allowed: 0 to 4"):
            stack.undo(n)
        with pytest.raises(ValueError, match="allowed: 0 to 4"), stack.applied(model, n):
            pass


def test_a_saved_stack_reads_back_bit_for_bit(tiny_model, tmp_path: Path):
    model = in_dtype(tiny_model("gpt2"), torch.bfloat16)
    stack = stack_of(model)
    for _ in range(2):  # writing over an older one is fine
        save_stack(stack, tmp_path / "stack")
    assert [p.name for p in tmp_path.iterdir()] == ["stack"]
    read = load_stack(tmp_path / "stack")
    assert (read.base_name, read.base_sha256, len(read)) == (stack.base_name, stack.base_sha256, 4)
    for old, new in zip(stack.edits, read.edits, strict=True):
        assert same(dict(old.values), dict(new.values))
        assert (old.mask.components, old.mask.parts) == (new.mask.components, new.mask.parts)
    with stack.applied(model):
        expected = snapshot(model)
    with read.applied(model):
        assert same(snapshot(model), expected)
    save_edit(read.merge(), tmp_path / "merged.safetensors")
    with applied(model, load_edit(tmp_path / "merged.safetensors")):
        assert same(snapshot(model), expected)


def test_a_single_edit_is_a_stack_of_one(tiny_model, tmp_path: Path):
    model = tiny_model()
    edit = drawn_edit(model, mask_of(model, [MLP]), 1)
    save_edit(edit, tmp_path / "edited" / "edit.safetensors")
    for path in (tmp_path / "edited", tmp_path / "edited" / "edit.safetensors"):
        (only,) = load_stack(path).edits
        assert same(dict(only.values), dict(edit.values))


def test_folders_that_are_no_stack_are_refused(tiny_model, tmp_path: Path):
    model = tiny_model()
    with pytest.raises(FileNotFoundError, match="no edit at"):
        load_stack(tmp_path)
    save_stack(stack_of(model), tmp_path / "stack")
    (tmp_path / "stack" / "edit-2.safetensors").replace(tmp_path / "stack" / "edit-3.safetensors")
    with pytest.raises(FileNotFoundError, match="edit-2"):
        load_stack(tmp_path / "stack")
    save_edit(drawn_edit(model, mask_of(model, [MLP]), 1), tmp_path / "stack" / "edit-2.safetensors")
    with pytest.raises(ValueError, match=r"edit-2.safetensors is not the edit that stack.json names"):
        load_stack(tmp_path / "stack")
    (tmp_path / "stack" / "stack.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match="is no saved stack"):
        load_stack(tmp_path / "stack")


def blocks(facts: FactSet, n: int = 2) -> list[FactSplit]:
    """Splits that forget the colours of 8 people each, every one with all other facts to retain."""
    people = list(dict.fromkeys(fact.subject for fact in facts))
    made = []
    for i in range(n):
        names = people[8 * i : 8 * i + 8]
        forget = facts.where(lambda fact, names=names: fact.relation == "colour" and fact.subject in names)
        made.append(split_facts(facts, with_edit_targets(forget), seed=i))
    return made


def keys(facts) -> set:
    return {fact.key for fact in facts}


def test_splits_in_sequence_retain_nothing_forgotten_and_score_nothing_trained_on(tiny_facts):
    raw = blocks(tiny_facts, 3)
    assert keys(raw[1].retain_train) & keys(raw[0].forget)  # why there is something to do
    splits = in_sequence(raw)
    assert splits[0] == raw[0]
    for i, split in enumerate(splits):
        assert keys(split.forget) == keys(raw[i].forget)
        assert split.retain_train
        split.check()
        for earlier in splits[:i]:
            for part in ("retain_train", "retain_test", "same_subject"):
                assert not keys(getattr(split, part)) & keys(earlier.forget)
            assert not keys(split.retain_train) & keys((*earlier.retain_test, *earlier.same_subject))
            assert not keys((*split.retain_test, *split.same_subject)) & keys(earlier.retain_train)
    kept = held_out(splits)
    subjects = {fact.subject for split in splits for fact in split.forget}
    assert keys(kept) == {fact.key for fact in splits[0].retain_test if fact.subject not in subjects}
    assert keys(kept)
    assert split_after(raw[0], []) == raw[0]
    assert held_out([]) == ()


def test_splits_read_back_as_they_were(tiny_facts, tmp_path: Path):
    first = blocks(tiny_facts, 1)[0]
    odd = replace(first.forget_hidden[0], neighborhood=(("Cora Petrov lives in", "Oslo"),))
    splits = (replace(first, forget_hidden=(odd, *first.forget_hidden[1:])), replace(first, seed=3, fold=1))
    save_splits(splits, tmp_path / "splits.json")
    assert load_splits(tmp_path / "splits.json") == splits
    with pytest.raises(FileNotFoundError, match="no splits at"):
        load_splits(tmp_path / "none.json")
    for text in ("{", "[]", '{"format": "x"}', '{"format": "mechunlearn splits 1", "splits": [{}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="holds no saved splits"):
            load_splits(tmp_path / "bad.json")


def test_edits_in_sequence_are_each_made_on_the_model_with_the_earlier_ones(tiny_model, tiny_facts):
    model, seen = tiny_model(), []
    base, splits = snapshot(model), in_sequence(blocks(tiny_facts))
    editor = partial(inject, steps=3, learning_rate=1e-2, batch_size=8)

    def choose(now: Model, split: FactSplit) -> ParameterMask:
        seen.append(now.sha256)
        return mask_of(now, [OTHER])

    stack = edit_sequentially(model, editor, [(mask_of(model, [MLP]), splits[0]), (choose, splits[1])])
    assert same(snapshot(model), base)
    first = editor(model, mask_of(model, [MLP]), splits[0])
    assert same(dict(first.values), dict(stack.edits[0].values))
    with applied(model, first):
        second = editor(model, mask_of(model, [OTHER]), splits[1])
        assert seen == [model.sha256] == [stack.edits[1].base_sha256]
    assert same(dict(second.values), dict(stack.edits[1].values))
    longer = edit_sequentially(model, editor, [(mask_of(model, [MLP]), splits[0])], start=stack)
    assert longer.edits[:2] == stack.edits
    with stack.applied(model):
        assert longer.edits[2].base_sha256 == model.sha256
    with pytest.raises(ValueError, match=r"split 2 retains .* which edit 1 forgets; pass the splits through"):
        edit_sequentially(model, editor, [(mask_of(model, [MLP]), split) for split in blocks(tiny_facts)])
    assert same(snapshot(model), base)


def test_an_exported_stack_is_the_model_with_all_edits(tiny_model, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    stack = stack_of(model)
    stack.export(model, tmp_path / "exported")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    with stack.applied(model):
        assert same({n: p.detach() for n, p in hf.named_parameters()}, snapshot(model))


def nudged(model: Model, seed: int) -> WeightEdit:
    """An edit that moves one MLP a little from where it is: what drift is measured on need not be a good edit."""
    edit = drawn_edit(model, mask_of(model, [Component("mlp", seed)]), seed)
    old = {name: model.hf.get_parameter(name).detach()[edit.mask.full(name)] for name in edit.values}
    return replace(edit, values={name: old[name] + 0.2 * value for name, value in edit.values.items()})


def test_drift_is_what_each_state_of_the_model_measures_by_hand(knowing: Model, tiny_facts):
    model, splits = knowing, in_sequence(blocks(tiny_facts))
    base = snapshot(model)
    stack = EditStack.of(model)
    for number in (1, 2):
        with stack.applied(model):
            edit = nudged(model, number)
        stack = stack.push(model, edit)
    table = drift(model, stack, splits)
    assert same(snapshot(model), base)
    assert list(zip(table["step"], table["block"], strict=True)) == [(s, b) for s in range(3) for b in (1, 2)]
    assert table["forgotten"].tolist() == [False, False, True, False, True, True]
    assert table["edit"].tolist() == ["", "", "drawn-1", "drawn-1", "drawn-2", "drawn-2"]
    kept = held_out(splits)
    prompts = [fact.ask(fact.prompt) for fact in kept[:64]]
    reference = reference_of(model, prompts)
    names = {name for edit in stack.edits for name in edit.values}
    norm = sum(float(base[name].double().square().sum()) for name in names) ** 0.5
    texts = ["The favourite colour of Bram is red", "Cora lives in the city of Rome"]
    fluent = perplexity(model, texts)
    with_texts = drift(model, stack, splits, texts=texts)
    for step in range(3):
        rows = table[table["step"] == step]
        with stack.applied(model, step):
            for (_, row), split in zip(rows.iterrows(), splits, strict=True):
                scores = score_facts(model, split.forget)
                assert row["p_true"] == pytest.approx(scores["p_true"].mean())
                assert row["accuracy"] == pytest.approx(scores["correct"].mean())
                beats = [_beats(model, fact) for fact in split.forget]
                assert row["edit_success"] == pytest.approx(sum(beats) / len(beats))
                assert row["n_facts"] == 8
                assert row["n_retained"] == len(kept)
                assert row["retained_accuracy"] == pytest.approx(score_facts(model, kept)["correct"].mean())
                assert row["kl_retained"] == pytest.approx(kl_from(model, reference))
                moved = (
                    sum(float((model.hf.get_parameter(n).detach() - base[n]).double().square().sum()) for n in names)
                    ** 0.5
                )
                assert row["relative_change"] == pytest.approx(moved / norm, rel=1e-5)
            ratio = with_texts[with_texts["step"] == step]["perplexity_ratio"]
            assert ratio.tolist() == pytest.approx([perplexity(model, texts) / fluent] * 2)
    assert table["kl_text"][:2].tolist() == table["kl_retained"][:2].tolist() == [0.0, 0.0]
    assert table["relative_change"].is_monotonic_increasing
    assert table["p_true"][0] > 0.9 > table["p_true"][5]


def _beats(model: Model, fact) -> bool:
    p = score_facts(model, [replace(fact, choices=(fact.target_true, fact.target_new))])["p_true"][0]
    return bool(p < 0.5)


def test_a_relapse_shows_in_the_earlier_blocks_row(knowing: Model, tiny_facts):
    """The second edit puts the first one's weights back: its block is known again."""
    model, splits = knowing, in_sequence(blocks(tiny_facts))
    stack = EditStack.of(model)
    mask = mask_of(model, [Component("mlp", 0), MLP, OTHER])
    old = {name: model.hf.get_parameter(name).detach()[mask.full(name)] for name in mask.entries}
    stack = stack.push(model, drawn_edit(model, mask, 5))
    with stack.applied(model):
        back = replace(drawn_edit(model, mask, 6), values=old)
    stack = stack.push(model, back)
    table = drift(model, stack, splits).set_index(["step", "block"])
    p_true, change = table["p_true"], table["relative_change"]
    assert p_true[0, 1] == pytest.approx(p_true[2, 1])
    assert p_true[1, 1] < 0.6 < 0.9 < p_true[2, 1]
    assert change[2, 1] == 0 < change[1, 1]
    assert table["kl_text"][2, 1] == 0 < table["kl_text"][1, 1]


def test_drift_without_what_it_needs_is_refused(tiny_model, tiny_facts):
    model = tiny_model()
    stack, splits = stack_of(model).undo(2), in_sequence(blocks(tiny_facts))
    with pytest.raises(ValueError, match="got 2 edits, 1 splits"):
        drift(model, stack, splits[:1])
    with pytest.raises(ValueError, match="drift: got 0 edits"):
        drift(model, EditStack.of(model), [])
    crossed = [splits[0], replace(splits[1], retain_train=splits[0].retain_test, retain_test=splits[0].retain_train)]
    with pytest.raises(ValueError, match=r"no retained facts .* splits.in_sequence, or give"):
        drift(model, stack, crossed)
    few = drift(model, stack, crossed, retained=splits[0].retain_test[:3], max_facts=2)
    assert set(few["n_retained"]) == {2} == set(few["n_facts"])
