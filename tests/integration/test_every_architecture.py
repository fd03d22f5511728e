"""From a saved folder to a checkpoint that plain transformers loads, for every architecture."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from mechunlearn import localize
from mechunlearn.checkpoints import load_model, save_model
from mechunlearn.edit.edits import applied, export_edit
from mechunlearn.edit.inject import inject
from mechunlearn.masks import select_components


@torch.no_grad()
def _logits(hf, ids):
    return hf(ids).logits


def test_localize_edit_export_and_reload_from_a_folder(any_model, split, tmp_path):
    save_model(any_model, tmp_path / "model")
    model = load_model(tmp_path / "model")
    ids = torch.tensor([[0, 5, 7, 9, 11]])
    before = _logits(model.hf, ids)
    assert torch.equal(before, _logits(any_model.hf, ids))
    scores = localize.attribution_patching(model, split.forget[:6])
    mask = select_components(
        replace(scores, per_fact=abs(scores.per_fact)), model, budget=0.5, kinds=("mlp", "attention")
    )
    edit = inject(model, mask, split, steps=2, learning_rate=1e-2, seed=0)
    with applied(model, edit):
        inside = _logits(model.hf, ids)
    assert not torch.equal(inside, before)
    assert torch.equal(_logits(model.hf, ids), before)
    export_edit(model, edit, tmp_path / "edited")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
    torch.testing.assert_close(_logits(plain, ids), inside, rtol=1e-4, atol=1e-5)
