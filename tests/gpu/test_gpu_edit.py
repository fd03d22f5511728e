from functools import partial

import pytest
import torch

from mechunlearn import masks
from mechunlearn.components import Component
from mechunlearn.edit import EDITORS
from mechunlearn.edit.edits import applied
from mechunlearn.edit.inject import inject
from mechunlearn.edit.sequential import edit_sequentially
from mechunlearn.evaluate.drift import drift
from mechunlearn.facts import FactSplit, split_facts, with_edit_targets
from mechunlearn.localize.entry_scores import entry_scores
from mechunlearn.metrics import score_facts
from mechunlearn.models import wrap_model
from mechunlearn.random_masks import random_mask_like
from mechunlearn.selection import select_entries
from mechunlearn.splits import in_sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run with -m gpu on a machine with one"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_on_the_gpu_fits_and_restores_bit_for_bit(tiny_model, split: FactSplit, dtype: torch.dtype):
    cpu = tiny_model()
    model = wrap_model(cpu.hf.to("cuda", dtype), cpu.tokenizer)
    mask = masks.mask_of(model, [Component("mlp", 1), Component("head", 2, 1), Component("neuron", 0, 3)])
    before = model.sha256
    edit = inject(model, mask, split, steps=20, learning_rate=1e-2)
    assert edit.history[-1] < edit.history[0]
    assert all(value.dtype == dtype for value in edit.values.values())
    with applied(model, edit):
        assert score_facts(model, split.forget)["p_true"].between(0, 1).all()
    assert model.sha256 == before


def test_scores_on_the_gpu_equal_those_on_the_cpu(tiny_model, tiny_facts):
    facts, cpu, gpu = tiny_facts[:10].facts, tiny_model(), tiny_model()
    gpu.hf.to("cuda")
    for form in ("prompt", "choice"):
        a, b = (score_facts(model, facts, form)["p_true"].tolist() for model in (cpu, gpu))
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_form_edits_on_the_gpu_are_those_on_the_cpu(
    tiny_model, tiny_split: FactSplit, dtype: torch.dtype, name: str
):
    from dataclasses import replace

    parts = ("forget_shown", "forget_hidden", "attack_dev")
    split = replace(tiny_split, **{part: with_edit_targets(getattr(tiny_split, part)[:2]) for part in parts})
    edits = []
    for device in ("cpu", "cuda"):
        tiny = tiny_model()
        model = wrap_model(tiny.hf.to(device, dtype), tiny.tokenizer)
        mask, before = masks.mask_of(model, [Component("mlp", 0), Component("mlp", 1)]), model.sha256
        edits.append(EDITORS.get(name).function(model, mask, split, steps=5, n_texts=50, cache=False))
        assert model.sha256 == before
    for key, value in edits[0].values.items():
        tolerance = 1e-3 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(edits[1].values[key], value, atol=tolerance * float(value.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_of_edits_of_rows_and_matrices_on_the_gpu_merges_and_restores_bit_for_bit(
    tiny_model, tiny_facts, dtype: torch.dtype
):
    cpu = tiny_model("gpt2")
    model = wrap_model(cpu.hf.to("cuda", dtype), cpu.tokenizer)
    before, facts = model.sha256, tiny_facts.of("colour").facts
    scores = {name: score.to("cuda") for name, score in entry_scores(model, facts[:4]).items()}
    rows = select_entries(model, scores, budget=2000, granularity="row")
    chosen = [rows, masks.mask_of(model, [Component("attention", 1)], matrices=("k", "o")),
              random_mask_like(rows, model, seed=0, exclude=True)]  # fmt: skip
    people = list(dict.fromkeys(fact.subject for fact in facts))
    splits = in_sequence([
        split_facts(tiny_facts, with_edit_targets(f for f in facts if f.subject in people[8 * i : 8 * i + 8]), seed=i)
        for i in range(3)
    ])  # fmt: skip
    stack = edit_sequentially(model, partial(inject, steps=5), list(zip(chosen, splits, strict=True)))
    assert model.sha256 == before
    with stack.applied(model):
        edited = model.sha256
    with applied(model, stack.merge()):
        assert model.sha256 == edited != before
    table = drift(model, stack, splits)
    assert model.sha256 == before
    assert table["relative_change"].tolist()[-1] > 0 == table["kl_text"][0]
