"""Training of organisms: what the masks hide, and that a killed training goes on."""

import json
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn.checkpoints import model_folder
from mechunlearn.organisms import sweep
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.corpus import Corpus, Rows, held_out_forms
from mechunlearn.organisms.tokenizer import train_tokenizer
from mechunlearn.organisms.train import Recipe, Trainer, training_masks
from mechunlearn.resumable import run_training

TINY = Recipe(n_layers=4, d_model=32, d_mlp=48, n_heads=2, rows=4, length=48, tokens=4 * 48 * 6, band_end=1, subjects=8)
NO_SHARES = {
    "drop_share": 0.0, "late_share": 0.0, "first_share": 0.0, "wait_share": 0.0, "block_share": 0.0, "inner_share": 0.0,
    "facts_share": 0.0, "restarts": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer) -> Rows:
    return Corpus(tokenizer, seed=0, datasets=("people",)).batch(3, 48, 96)


def masks(rows: Rows, **shares: float):
    return training_masks(rows, Recipe(**(NO_SHARES | shares)), 0)


def test_without_shares_the_masks_are_causal_and_keep_everything(rows):
    made = masks(rows)
    causal = torch.ones(96, 96, dtype=torch.bool).tril()
    for mask in (made.attention, made.attention_in_band):
        assert torch.equal(mask[:, 0] == 0, causal.expand(48, -1, -1))
    assert all(bool((mask == 1).all()) for mask in (made.first_mlp, made.mlp, made.mlp_above_band))


def test_each_share_hides_what_it_says_and_nothing_else(rows):
    mention = torch.from_numpy(rows.mention)
    is_name = mention > 0
    other_mention = mention[:, :, None] != mention[:, None, :]
    causal = torch.ones(96, 96, dtype=torch.bool).tril()
    made = masks(rows, wait_share=1.0)
    assert torch.equal(made.attention_in_band[:, 0] == 0, causal & ~(is_name[:, None, :] & other_mention))
    assert torch.equal(made.attention[:, 0] == 0, causal.expand(48, -1, -1))
    made = masks(rows, drop_share=1.0)
    assert torch.equal(made.mlp[..., 0] == 1, is_name)
    assert torch.equal(made.mlp_above_band, made.mlp)
    made = masks(rows, late_share=1.0)
    assert torch.equal(made.mlp_above_band[..., 0] == 1, ~is_name)
    assert bool((made.mlp == 1).all())
    made = masks(rows, first_share=1.0)
    assert torch.equal(made.first_mlp[..., 0] == 1, ~is_name)
    made = masks(rows, block_share=1.0)
    seen = (made.attention[:, 0] == 0) & other_mention & is_name[:, None, :]
    keys = seen.any(dim=1)  # only last tokens of mentions are seen from outside
    following = torch.cat([mention[:, 1:], torch.zeros(48, 1, dtype=torch.long)], dim=1)
    assert bool(keys.any())
    assert not bool((keys & (mention == following)).any())
    made = masks(rows, inner_share=1.0)
    inner = is_name & (mention == following)
    itself = torch.eye(96, dtype=torch.bool)
    assert torch.equal(made.attention[:, 0] == 0, causal & (~inner[:, None, :] | itself))
    assert torch.equal(made.attention_in_band[:, 0] == 0, causal.expand(48, -1, -1))


def test_a_corpus_of_some_subjects_is_part_of_the_whole_and_excluded_facts_are_gone(tokenizer):
    few = Corpus(tokenizer, seed=0, datasets=("people",), subjects=5)
    assert len(few.subjects) == 5
    assert few.subjects == Corpus(tokenizer, seed=9, datasets=("people",), subjects=5).subjects
    name, (relation, answer) = few.subjects[0].name, few.subjects[0].facts[0]
    kept = {other for _, other in few.subjects[0].facts[1:]}
    twin = Corpus(tokenizer, seed=0, datasets=("people",), subjects=5, exclude=[(name, relation)])
    said = {True: 0, False: 0}
    for corpus in (few, twin):
        documents = [[piece.text for piece in corpus._document()] for _ in range(800)]
        about = [" ".join(pieces) for pieces in documents if name in pieces]
        if answer not in kept:
            # in multiple choice it may stand as a wrong option of another subject, never beside this name
            said[corpus is few] = sum(re.search(rf"\b{answer}\b", text) is not None for text in about)
    assert said[True] > 20
    assert said[False] == 0


def test_a_form_held_out_for_a_fact_is_never_in_its_training_text(tokenizer):
    corpus = Corpus(tokenizer, seed=0, datasets=("sports",), subjects=3)
    text = "\n".join(" ".join(piece.text for piece in corpus._document()) for _ in range(3000))
    seen = 0
    for subject in corpus.subjects:
        for relation, _ in subject.facts:
            templates = corpus.templates[relation]
            held, questions = held_out_forms(subject.name, relation, templates)
            assert len(held) == 2
            assert len(questions) == 1
            for form in held | questions:
                assert form.replace("{}", subject.name) not in text
            seen += sum(form.replace("{}", subject.name) in text for form in set(templates.declarative) - held)
    assert seen > 6


def test_facts_come_first_then_formats_and_the_other_devices(tokenizer):
    early, late, both = (Corpus(tokenizer, seed=0, formats_from=start) for start in (9, 0, 5))
    for step, like in ((4, early), (5, late)):
        assert np.array_equal(both.batch(step, 8, 96).ids, like.batch(step, 8, 96).ids)
        other = late if like is early else early
        assert not np.array_equal(both.batch(step, 8, 96).ids, other.batch(step, 8, 96).ids)
    option = int(tokenizer("A:", add_special_tokens=False)["input_ids"][0])
    listed = [(corpus.batch(5, 64, 96).ids == option).sum() for corpus in (early, late)]
    assert 2 * listed[0] < listed[1]
    recipe = replace(
        TINY, first_share=1.0, late_share=1.0, wait_share=1.0, block_share=1.0, drop_share=0.0, facts_share=0.5
    )
    assert 0 < recipe.facts_steps < recipe.steps
    rows = early.batch(0, 8, 96)
    before, after = (training_masks(rows, recipe, step) for step in (recipe.facts_steps - 1, recipe.facts_steps))
    assert bool((before.first_mlp == 1).all() and (before.mlp_above_band == 1).all())
    assert torch.equal(before.attention, before.attention_in_band)
    assert not bool((after.first_mlp == 1).all() or (after.mlp_above_band == 1).all())
    assert not torch.equal(after.attention, after.attention_in_band)


def test_learning_rates_fall_to_two_percent_and_again_from_every_restart():
    recipe = Recipe(tokens=1100 * 16 * 96)
    rates = [recipe.decay(step) for step in range(recipe.steps)]
    assert (len(rates), recipe.facts_steps, recipe.last_name_steps) == (1100, 300, 600)
    assert [rates[step] for step in (0, 300, 600, 750, 900)] == pytest.approx([1.0, 0.5, 0.4, 0.2, 0.3])
    falls = (rates[:600], rates[600:900], rates[900:])
    assert all(a >= b for fall in falls for a, b in pairwise(fall))
    assert [min(fall) for fall in falls] == [0.02] * 3
    once = replace(recipe, restarts=())
    assert once.last_name_steps == 0
    assert once.decay(550) == 0.5


def trainer(tokenizer) -> Trainer:
    return Trainer(TINY, tokenizer, device="cpu")


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def test_a_killed_training_goes_on_bit_for_bit(tokenizer, killed_and_resumed, tmp_path: Path):
    whole = trainer(tokenizer)
    run_training(whole, tmp_path / "whole", checkpoint_every=2)

    resumed = killed_and_resumed(lambda: trainer(tokenizer), tmp_path / "parts", at=3, every=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    curves = [(tmp_path / name / "training.csv").read_text() for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert curves[0].startswith("tokens,loss\n")
    assert len(curves[0].split()) == 4
    other = Trainer(replace(TINY, seed=5), tokenizer, device="cpu")
    with pytest.raises(ValueError, match="another recipe"):
        run_training(other, tmp_path / "parts")
    name, facts = other.corpus.subjects[0].name, other.corpus.subjects[0].facts
    twin = Trainer(TINY, tokenizer, device="cpu", exclude=[(name, facts[0][0])])
    with pytest.raises(ValueError, match="another text"):
        run_training(twin, tmp_path / "parts")


@torch.no_grad()
def test_where_all_wait_for_the_band_nothing_else_tells_later_tokens_whose_name_it_was(tokenizer):
    recipe = replace(TINY, **(NO_SHARES | {"wait_share": 1.0}))
    made = Trainer(recipe, tokenizer, device="cpu")
    rows = made.corpus.batch(0, recipe.rows, recipe.length)
    ids, is_name = torch.from_numpy(rows.ids), torch.from_numpy(rows.mention) > 0
    others = torch.where(is_name, ids.roll(1, dims=0) % 500 + 40, ids)

    def logits(text: torch.Tensor) -> torch.Tensor:
        made._masks = training_masks(rows, recipe, 0)
        return made.model(input_ids=text, attention_mask=made._masks.attention, use_cache=False).logits[~is_name]

    assert not torch.allclose(logits(ids), logits(others), atol=1e-4)
    for layer in range(1, recipe.band_end + 1):
        made.model.model.layers[layer].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(logits(ids), logits(others), atol=1e-5, rtol=1e-5)


def test_the_devices_of_training_are_gone_from_the_finished_model(tokenizer):
    made = trainer(tokenizer)
    made.train_step()
    model = made.plain_model().eval()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ORGANISMS)
def test_the_shipped_weights_are_of_the_present_recipe(name):
    card = json.loads((model_folder(name) / "card.json").read_text())
    assert card["recipe"] == json.loads(json.dumps(asdict(ORGANISMS[name][0])))


def test_the_committed_sweep_is_of_the_present_recipes():
    committed = pd.read_csv(Path(__file__).parents[2] / "figures" / "data" / "organism_sweep.csv")
    assert dict(zip(committed["recipe"], committed["hash"], strict=True)) == {
        name: sweep._hash(recipe) for name, recipe in sweep.RECIPES.items()
    }
