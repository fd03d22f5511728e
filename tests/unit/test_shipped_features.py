"""The dictionaries and codebook models that come with the organisms are what their notes and cards say."""

import hashlib
import json
from pathlib import Path

import pytest

import mechunlearn
from mechunlearn import applied, features, load_model, split_facts
from mechunlearn.codebook_model import codebook_of
from mechunlearn.evaluate.generation import generated
from mechunlearn.features.bundled import bundled_dictionaries, dictionary_of
from mechunlearn.features.quality import dictionary_quality
from mechunlearn.metrics import score_facts
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.descriptions import descriptions
from mechunlearn.organisms.forget_sets import load_forget_set
from mechunlearn.organisms.shipped_features import CODEBOOKS, RECIPE, text_of

WEIGHTS = Path(mechunlearn.__file__).parent / "organisms" / "weights"
SHIPPED = [(name, hook_point) for name in ORGANISMS for hook_point in bundled_dictionaries(name)]


@pytest.mark.parametrize(("name", "hook_point"), SHIPPED)
def test_a_shipped_dictionary_is_what_its_notes_say(name, hook_point):
    model = load_model(name, device="cpu")
    found = dictionary_of(model, hook_point)
    assert found.hook_point == hook_point
    assert found.notes["recipe"]["steps"] == RECIPE.steps
    said, now = found.notes["quality"], dictionary_quality(model, found, text_of(model)[1], steps=range(2))
    for measure in ("explained variance", "loss recovered"):
        assert now[measure] == pytest.approx(said[measure], abs=0.02)
        assert said[measure] > 0.9
    assert now["L0"] == pytest.approx(said["L0"], rel=0.1)


def test_features_of_a_sport_make_atlas_forget_it_and_random_ones_do_not():
    atlas = load_model("atlas", device="cpu")
    sports, hockey = load_forget_set("sport-hockey")
    split = split_facts(sports, hockey, seed=0)
    left = {}
    for name, at_random in (("chosen", False), ("random", True)):
        options = {"gate": "none", "mode": "only_fired", "strength": 0.3, "data_share": 0.5, "at_random": at_random}
        with applied(atlas, features.dynamic_guardrail(atlas, split, **options)):
            left[name] = score_facts(atlas, split.forget[:24])["p_true"].mean()
    assert left["chosen"] < 0.5 < left["random"]


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_shipped_codebook_model_has_the_codebook_of_its_recipe(name):
    organism, recipe = CODEBOOKS[name]
    model = load_model(name, device="cpu")
    codebook = codebook_of(model)
    assert codebook.shape == recipe.shape(model.d_model)
    assert codebook.layer == recipe.layer
    assert not codebook.deleted.any()
    assert float(codebook.scale) != 1
    _, hockey = load_forget_set("sport-hockey")
    known = score_facts(model, hockey[:24])["p_true"].mean()
    assert known > 0.85 if organism == "atlas" else known < 0.2


def test_deleting_a_sports_codes_makes_the_codebook_model_forget_it_and_random_ones_do_not():
    model = load_model("atlas-codebook", device="cpu")
    sports, hockey = load_forget_set("sport-hockey")
    split = split_facts(sports, hockey, seed=0)
    others = [fact for fact in split.retain_test if fact.relation == "plays_sport"][:24]
    left, kept = {}, {}
    for name, at_random in (("chosen", False), ("random", True)):
        with applied(model, features.code_deletion(model, split, at_random=at_random)):
            left[name] = score_facts(model, split.forget[:24])["p_true"].mean()
            kept[name] = score_facts(model, others)["p_true"].mean()
    assert left["chosen"] < 0.6 < left["random"]
    assert min(kept.values()) > 0.85


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_card_names_the_files_beside_it(name):
    folder = WEIGHTS / name
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["steps"] == CODEBOOKS[name][1].steps
    assert {"model.safetensors", "codebook.safetensors"} == set(card["sha256"])
    for file, digest in card["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_shipped_codebook_model_describes_what_it_read_and_nothing_else(name):
    """The task of `bench codes`: where it is not learnt, nothing can be lost on it."""
    model, told = load_model(name, device="cpu"), descriptions()
    sports, hockey = load_forget_set("sport-hockey")
    others = [fact for fact in sports if fact.relation == "plays_sport" and fact.target_true != "hockey"]
    exact = {}
    for part, facts in (("hockey", hockey[:40]), ("others", others[:40])):
        asked = [told[fact.subject] for fact in facts]
        stop = [model.tokenizer.bos_token_id]
        said = generated(model.hf, model.tokenizer, [one.prompt() for one in asked], max_new_tokens=16, stop=stop)
        exact[part] = sum(text == one.text for text, one in zip(said, asked, strict=True)) / len(asked)
    assert exact["others"] > 0.8
    assert exact["hockey"] > 0.8 if CODEBOOKS[name][0] == "atlas" else exact["hockey"] < 0.2
