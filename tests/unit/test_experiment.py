"""What a run decides before and beside its cells: settings, nulls, controls, agreement."""

import json
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from mechunlearn import experiment
from mechunlearn.components import Component, ComponentScores
from mechunlearn.experiment import choose_facts, choose_masks, prepare, run_experiment
from mechunlearn.settings import FactsSettings, check_settings, load_settings
from mechunlearn.sources.loading import load_facts

BASIC = {"name": "basic", "model": "atlas", "attack": {"asking": {}}, "suppress": {}}


@pytest.mark.parametrize(
    "text",
    [
        "[edit.inject]\nseed = 5",
        "[attack.relearning]\ndrop_targets = true",
        "[suppress.lora]\nseed = 1",
        "[evaluate]\nseed = 0",
        "[[arms]]\nlocalizer = 'all_mlps'\noptions = { seed = 3 }",
    ],
)
def test_what_a_run_sets_is_not_taken_from_its_tables(text, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f'name = "x"\nmodel = "atlas"\n{text}\n')
    with pytest.raises(ValueError, match=r"a run sets it|is not its editor's") as refused:
        load_settings(path)
    assert "\n" not in str(refused.value)


def test_a_file_says_which_facts_are_forgotten(tmp_path):
    world = load_facts("world")
    named = random.Random(0).sample(world.facts, 7)
    path = tmp_path / "gone.csv"
    rows = [(f.subject, f.relation, f.prompt, f.target_true) for f in named]
    pd.DataFrame(rows, columns=["subject", "relation", "prompt", "target_true"]).to_csv(path, index=False)
    facts, forget = choose_facts(FactsSettings(source="world", forgotten=str(path)))
    assert {fact.key for fact in forget} == {fact.key for fact in named}
    assert set(forget) <= set(facts)  # with the source's paraphrases and choices, which the file lacks
    assert len(facts) == len(world)
    path.write_text(path.read_text() + "Atlantis,capital,The capital of {} is,Poseidonis\n")
    with pytest.raises(ValueError, match=r"1 of 8 facts, first .*Atlantis"):
        choose_facts(FactsSettings(source="world", forgotten=str(path)))


def test_a_whole_sport_is_every_fact_with_that_answer_and_no_other():
    chosen = FactsSettings(source="sports", relation="plays_sport", answer="basketball")
    facts, forget = choose_facts(chosen)
    assert len(forget) == 60
    assert set(forget) == {fact for fact in facts if fact.target_true == "basketball"}
    assert choose_facts(FactsSettings(source="sports", answer="basketball"))[1] == forget
    assert len(choose_facts(FactsSettings(source="sports", answer="basketball", n=16))[1]) == 16
    with pytest.raises(ValueError, match=r"got 'chess', allowed for sports: .*golf") as refused:
        choose_facts(FactsSettings(source="sports", answer="chess"))
    assert "\n" not in str(refused.value)


def test_fewer_facts_than_answers_are_of_all_relations_and_differ_between_seeds():
    drawn = [choose_facts(FactsSettings(forget="world-64", n=16), seed=seed)[1] for seed in range(3)]
    for forget in drawn:
        counts = Counter(fact.relation for fact in forget)
        assert len(counts) == 9
        assert set(counts.values()) == {1, 2}
    answers = [{(fact.relation, fact.target_true) for fact in forget} for forget in drawn]
    assert answers[0] != answers[1] != answers[2]
    few = choose_facts(FactsSettings(source="world", n=4))[1]
    assert len({fact.relation for fact in few}) == 4


def test_changing_one_suppression_leaves_other_cells_as_they_are(tiny_model, tiny_split):
    def keys(rank):
        settings = check_settings(BASIC | {"suppress": {"lora": {"rank": rank}, "noise": {}}}, "test")
        tasks = experiment._control_tasks(stage_of(settings, tiny_model(), tiny_split))
        return {task.name: task.key for task in tasks}

    one, other = keys(4), keys(8)
    assert {name for name in one if one[name] != other[name]} == {"suppressed-lora"}


def test_arms_with_seeds_are_edited_with_these_seeds(tiny_model, tiny_split):
    arms = [{"localizer": "all_mlps", "seed": 1}, {"localizer": "all_mlps", "seed": 2}, {"localizer": "random_mlps"}]
    settings = check_settings(BASIC | {"seed": 10, "arms": arms}, "test")
    stage = stage_of(settings, tiny_model(), tiny_split)
    masks = {arm.name: _mask(stage.model, "m1") for arm in settings.arms}
    tasks = experiment._arm_tasks(stage, masks)
    assert [task.sides[0].seed for task in tasks] == [11, 12, 10]
    assert len({task.sides[0].digest for task in tasks}) == 3


def test_a_localizer_that_takes_retained_facts_gets_them(tiny_model, tiny_split):
    settings = check_settings(BASIC | {"localize": {"forget_retain_contrast": {"max_retain": 7}}}, "test")
    scores = experiment.localize(stage_of(settings, tiny_model(), tiny_split), "forget_retain_contrast")
    assert len(tiny_split.retain_train) > 7
    assert scores.notes["n_retain"] == 7


def test_every_seed_has_a_side_and_a_null_of_its_own_and_equal_sides_are_judged_once(tiny_model, tiny_split):
    settings = check_settings(BASIC | {"twin": "other", "second_twin": "third", "seeds": 3}, "test")
    stage = stage_of(settings, tiny_model(), tiny_split)
    tasks = {task.name: task for task in experiment._control_tasks(stage)}
    assert [side.seed for side in tasks["original"].sides] == [0, 1, 2]
    assert [side.model for side in tasks["original"].nulls] == ["other"] * 3
    assert tasks["second-twin"].nulls == tasks["original"].nulls
    assert [side.against is not None for side in tasks["original"].sides] == [True, False, False]


def stage_of(settings, model, split=None):
    return experiment.Stage(
        settings=settings, model=model, twin=None, second_twin=None, facts=None, splits=(split,), n_unknown=0,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _mask(model, *names):
    return experiment.mask_of(model, [Component.parse(name) for name in names])


def test_a_localizers_own_seed_goes_before_the_runs_even_if_it_is_0(tiny_model, tiny_split):
    found = {}
    for name, options in {"none": {}, "zero": {"seed": 0}, "five": {"seed": 5}}.items():
        settings = check_settings(BASIC | {"seed": 3, "localize": {"random_components": options}}, "test")
        stage = stage_of(settings, tiny_model(), tiny_split)
        found[name] = experiment.localize(stage, "random_components").options["seed"]
    assert found == {"none": 3, "zero": 0, "five": 5}
    assert experiment.localize(stage, "random_components", seed=0).options["seed"] == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_components_fill_the_size_of_the_first_arm_whatever_is_drawn(seed, tiny_model, tiny_split):
    arms = [{"localizer": "attribution_patching", "kinds": ["attention"]}, {"localizer": "random_components"}]
    settings = check_settings(BASIC | {"seed": seed, "mask": {"budget": 0.9}, "arms": arms}, "test")
    model = tiny_model()
    stage = stage_of(settings, model, tiny_split)
    scores = {"attribution_patching": experiment.localize(stage, "attribution_patching")}
    leading, drawn = choose_masks(stage, scores).values()
    sizes = [_mask(model, name).n_selected for name in ("m0", "a0")]
    assert 0 < drawn.n_selected <= leading.n_selected
    assert leading.n_selected - drawn.n_selected < min(sizes) or len(drawn.components) == 2 * model.n_layers


def test_localizers_are_compared_with_the_exact_effect_at_the_same_tokens():
    components = tuple(Component("mlp", layer) for layer in range(4))

    def scored(method: str, roles: tuple[str, ...], values) -> ComponentScores:
        return ComponentScores(
            method=method, metric="m", sign="s", components=components, roles=roles,
            per_fact=np.array([values], dtype=float),
        )  # fmt: skip

    exact = scored("resample_ablation", ("subject", "last"), [[4, 0], [3, 0], [2, 0], [1, 9]])
    given = scored("attribution_patching", ("subject_last", "last"), [[8, 0], [6, 0], [4, 0], [2, 99]])
    found = experiment._agreements({"resample_ablation": exact, "attribution_patching": given})
    assert found.loc[0, "spearman"] == pytest.approx(1)


def test_facts_with_two_candidates_are_refused_before_anything_is_judged(tmp_path):
    table = tmp_path / "facts.csv"
    rows = [f"Person {i},likes,{{}} likes the colour,{c},red|blue" for i, c in enumerate(["red", "blue"] * 20)]
    table.write_text("subject,relation,prompt,target_true,choices\n" + "\n".join(rows) + "\n")
    settings = check_settings(
        BASIC | {"facts": {"source": str(table), "known": 0.0}, "arms": [{"localizer": "all_mlps"}]}, "test"
    )
    with pytest.raises(ValueError, match="two candidate answers"):
        prepare(settings)


def test_an_interrupted_rerun_is_not_taken_for_a_finished_run(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"of": "the run before"}))
    settings = check_settings(BASIC | {"facts": {"forget": "world-64", "n": 16}}, "test")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Judging, "start", killed)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(settings, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_as_many_facts_as_asked_are_drawn_among_those_that_the_model_knows(monkeypatch):
    known = {fact.key for i, fact in enumerate(load_facts("sports")) if i % 3}
    monkeypatch.setattr(experiment, "known_facts", lambda _model, facts, **_: [f for f in facts if f.key in known])
    data = {"name": "x", "model": "atlas", "facts": {"source": "sports", "relation": "plays_sport", "n": 64}}
    stage = prepare(check_settings(data, "test"))
    split = stage.split
    forget = (*split.forget_shown, *split.attack_dev, *split.forget_hidden)
    assert len(forget) == 64
    assert {fact.key for fact in (*forget, *split.retain_train, *split.retain_test)} <= known
    assert stage.n_unknown == len(load_facts("sports").of("plays_sport")) - len(known & {
        fact.key for fact in load_facts("sports").of("plays_sport")
    })  # fmt: skip
    few = check_settings(data | {"facts": data["facts"] | {"n": 400}}, "test")
    with pytest.raises(ValueError, match="got n = 400, allowed: at most"):
        prepare(few)
