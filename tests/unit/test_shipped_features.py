"""The dictionaries that come with the organisms: what their notes say of them is so, on text that they never saw."""

import pytest

from mechunlearn import applied, features, load_model, split_facts
from mechunlearn.features.bundled import bundled_dictionaries, dictionary_of
from mechunlearn.features.quality import dictionary_quality
from mechunlearn.metrics import score_facts
from mechunlearn.organisms.bundle import ORGANISMS
from mechunlearn.organisms.forget_sets import load_forget_set
from mechunlearn.organisms.shipped_features import RECIPE, text_of

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
