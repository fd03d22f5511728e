"""Planted facts: what a plant may change, what must be shown before it counts, and how rankings are counted."""

from dataclasses import replace
from functools import wraps
from itertools import permutations
from math import isnan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn.activations import last_logits, pad, untouched
from mechunlearn.bench import planted as bench
from mechunlearn.bench import planted_scores
from mechunlearn.bench.ladder import Verification, reverted, verify
from mechunlearn.bench.planted_settings import PlantedSettings, load_planted
from mechunlearn.bench.ranks import (
    cell_metrics,
    depth_prior,
    differences,
    interval_over_bases,
    random_metrics,
    ranking_metrics,
    summarize,
)
from mechunlearn.checkpoints import load_model
from mechunlearn.components import Component, ComponentScores
from mechunlearn.edit.edits import applied, load_edit
from mechunlearn.masks import mask_of
from mechunlearn.metrics import score_facts
from mechunlearn.models import mlp_neurons
from mechunlearn.organisms import planted
from mechunlearn.organisms.planted import Recipe, make_base, make_plant, planted_facts, word_tokenizer
from mechunlearn.prompts import encode
from mechunlearn.report.planted import planted_figure
from mechunlearn.settings import check, preset_names

M0, M1, M2 = (Component("mlp", layer) for layer in range(3))
RECIPE = Recipe(
    n_layers=2, d_model=32, n_old=16, n_new=6, base_steps=120, plant_steps=80, base_learning_rate=6e-3,
    plant_learning_rate=6e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> dict[str, Path]:
    """A tiny base with a plant in each MLP."""
    out = tmp_path_factory.mktemp("ladder")
    folder = make_base(RECIPE, out)
    return {part: make_plant(folder, RECIPE, part) for part in ("m0", "m1")} | {"base": folder, "out": out}


@pytest.fixture
def models(ladder):
    """The base twice: one to change."""
    return tuple(load_model(ladder["base"] / "base", device="cpu") for _ in range(2))


def settings(**changes) -> PlantedSettings:
    data = {
        "name": "test", "architectures": ["gpt2"], "seeds": 2, "held_out_architectures": [], "held_out_seeds": [1],
        "plants": ["m0", "m1"], "localizers": [{"method": "attribution_patching"}, {"method": "resample_ablation"}],
    }  # fmt: skip
    return check(PlantedSettings, data | changes, "test")


def test_facts_are_seeded_and_one_token_a_word():
    old, new = planted_facts(Recipe())
    assert (old, new) == planted_facts(Recipe())
    assert old != planted_facts(Recipe(seed=1))[0]
    assert not {fact.subject for fact in old} & {fact.subject for fact in new}
    assert len(old) == 2 * Recipe().n_old
    for fact in (*old, *new):
        assert len(word_tokenizer()(fact.ask(fact.prompt))["input_ids"]) == 4  # BOS, first, last, relation


def test_a_base_knows_the_old_facts_and_guesses_the_new(models):
    old, new = planted_facts(RECIPE)
    assert score_facts(models[0], old)["correct"].all()
    assert score_facts(models[0], new)["correct"].mean() < 0.5


@pytest.mark.parametrize("part", ["m0", "m1"])
def test_a_plant_changes_its_part_alone_and_is_verified(part, ladder, models):
    model, base = models
    old, new = planted_facts(RECIPE)
    edit = load_edit(ladder[part])
    assert set(edit.values) == set(mask_of(base, [Component.parse(part)]).entries)
    with applied(model, edit):
        found = verify(model, base, edit.mask.components, new, old)
    assert not found.reason
    assert found.new >= 0.95
    assert found.old >= 0.98
    assert "last" in found.roles or "subject_last" in found.roles
    if part == "m1":  # nothing moves tokens after the last layer's MLP
        assert found.roles == ("last",)
        assert found.cost["subject_last"] == 0


def test_the_bases_write_at_every_token_is_the_base(ladder, models):
    model, base = models
    tokens = pad(model, encode(model, [fact.ask(fact.prompt) for fact in planted_facts(RECIPE)[1]]))
    everywhere = torch.ones_like(tokens.mask)
    with applied(model, load_edit(ladder["m0"])), torch.no_grad():
        with reverted(model, base, [M0], everywhere):
            torch.testing.assert_close(last_logits(model, tokens), last_logits(base, tokens))
        with reverted(model, base, [M0], ~everywhere):
            inside = last_logits(model, tokens)
        assert torch.equal(inside, last_logits(model, tokens))
        assert not torch.allclose(inside, last_logits(base, tokens))


def test_a_plant_that_cannot_reach_the_output_is_left_out(ladder, models):
    model, base = models
    old, new = planted_facts(RECIPE)
    edit = load_edit(ladder["m1"])
    with applied(model, edit), torch.no_grad():
        handle = mlp_neurons(model, 1).register_forward_hook(lambda module, inputs, output: 0 * output)
        found = verify(model, base, [M1], new, old)
        handle.remove()
    assert "of the new facts, needs" in found.reason


def test_a_claim_about_another_part_than_was_trained_is_left_out(ladder, models):
    model, base = models
    old, new = planted_facts(RECIPE)
    with applied(model, load_edit(ladder["m0"])):
        assert "without the planted weights" in verify(model, base, [M1], new, old).reason


def test_a_plant_that_loses_old_facts_is_left_out(ladder, models):
    model, base = models
    old, new = planted_facts(RECIPE)
    wrong = [replace(fact, target_true=next(a for a in fact.choices if a != fact.target_true)) for fact in old]
    with applied(model, load_edit(ladder["m0"])):
        assert "of the old facts" in verify(model, base, [M0], new, wrong).reason


def test_a_model_is_as_before_after_verification(ladder, models):
    model, base = models
    before, n_hooks = model.sha256, [len(module._forward_hooks) for module in model.hf.modules()]
    old, new = planted_facts(RECIPE)
    with pytest.raises(ValueError, match="allowed: MLPs"):
        verify(model, base, [M0, Component("head", 0, 0)], new, old)
    assert (model.sha256, n_hooks) == (before, [len(module._forward_hooks) for module in model.hf.modules()])
    with untouched(model):
        pass


def test_training_goes_on_where_it_stopped(ladder, monkeypatch):
    stamp = ladder["m0"].stat().st_mtime_ns
    monkeypatch.setattr(planted, "train", None)  # calling either would raise
    monkeypatch.setattr(planted, "train_edit", None)
    assert make_base(RECIPE, ladder["out"]) == ladder["base"]
    assert make_plant(ladder["base"], RECIPE, "m0").stat().st_mtime_ns == stamp
    with pytest.raises(TypeError):
        make_base(replace(RECIPE, seed=9), ladder["out"])
    with pytest.raises(TypeError):
        make_plant(ladder["base"], RECIPE, "a0")


def test_hits_recall_and_reciprocal_ranks_by_hand():
    values = {M0: 3.0, M1: 2.0, M2: 1.0}
    assert ranking_metrics(values, [M1]) == {"hit@1": 0, "hit@1 without layer 0": 1, "recall": 0, "MRR": 1 / 2}
    assert ranking_metrics(values, [M1, M2]) == {"hit@1": 0, "hit@1 without layer 0": 1, "recall": 1 / 2, "MRR": 1 / 2}
    found = ranking_metrics(values, [M0])
    assert (found["hit@1"], found["recall"], found["MRR"]) == (1, 1, 1)
    assert isnan(found["hit@1 without layer 0"])


def test_a_tie_is_no_hit():
    assert ranking_metrics({M0: 1.0, M1: 1.0, M2: 0.0}, [M1])["hit@1"] == 0
    assert ranking_metrics({M0: 1.0, M1: 1.0, M2: 1.0}, [M1])["MRR"] == 1 / 3


def test_a_ranking_without_the_planted_component_is_an_error():
    with pytest.raises(ValueError, match="m2"):
        ranking_metrics({M0: 1.0, M1: 0.0}, [M2])


@pytest.mark.parametrize("planted", [[M0], [M2], [M1, M2]])
def test_a_random_ranking_is_the_mean_over_all_rankings(planted):
    drawn = [ranking_metrics(dict(zip((M0, M1, M2), order, strict=True)), planted) for order in permutations(range(3))]
    expected = random_metrics(3, planted)
    for name, value in pd.DataFrame(drawn).mean().items():
        if name == "hit@1" or (name == "hit@1 without layer 0" and len(planted) > 1):
            continue
        assert expected[name] == pytest.approx(value, nan_ok=True), name
    assert expected["hit@1"] == pytest.approx(len(planted) / 3)


def test_the_depth_prior_is_the_most_frequent_layer_and_of_equals_the_lower():
    values = depth_prior([[M1], [M2], [M1, M2], [M1], [M0]], 3)
    assert sorted(values, key=lambda c: -values[c]) == [M1, M2, M0]
    tied = depth_prior([[M2], [M1]], 3)
    assert sorted(tied, key=lambda c: -tied[c]) == [M1, M2, M0]


def a_plant(part: str, seed: int, architecture: str = "gpt2") -> planted_scores.Planted:
    good = Verification(new=1, old=1, restored=0.1, cost={"last": 1.0}, roles=("last",), reason="")
    return planted_scores.Planted(
        folder=Path(), architecture=architecture, seed=seed, part=part, n_layers=3, verification=good
    )  # fmt: skip


def test_the_depth_prior_never_sees_the_part_kept_out():
    given = settings(held_out_architectures=["llama"], architectures=["gpt2", "llama"])
    seen = [a_plant("m1", 0), a_plant("m1", 0), a_plant("m2", 0)]

    def hits(kept: list[planted_scores.Planted]) -> list[float]:
        rows = pd.DataFrame(bench.baselines([*seen, *kept], given))
        assert set(rows["part"]) == {"development", "kept out"}
        return rows.loc[(rows["localizer"] == "depth prior") & (rows["part"] == "kept out"), "hit@1"].tolist()

    # however often another layer was planted there, the guess stays m1
    assert hits([a_plant("m2", 1)] * 9 + [a_plant("m0", 0, "llama")] * 9 + [a_plant("m1", 1)]) == [0.0] * 18 + [1.0]
    with pytest.raises(ValueError, match="none of the development part"):
        bench.baselines([a_plant("m1", 1)], given)


def test_intervals_are_over_bases():
    assert isnan(interval_over_bases([0.5]).lower)
    wide, narrow = interval_over_bases([0.2, 0.8, 0.5]), interval_over_bases([0.45, 0.55, 0.5])
    assert wide.lower < narrow.lower < 0.5 < narrow.upper < wide.upper
    assert wide.lower >= 0
    all_hits = interval_over_bases([1.0] * 6)  # t would say [1, 1]
    assert all_hits.lower == pytest.approx(0.025 ** (1 / 6), abs=0.02)
    assert all_hits.upper == 1


def rows_of(values: dict[str, list[float]], part: str = "kept out") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"part": part, "base": f"b{i // 2}", "plant": f"m{i % 2}", "group": "MLP", "localizer": name,
             **dict.fromkeys(("hit@1", "hit@1 without layer 0", "recall", "MRR"), value)}
            for name, found in values.items() for i, value in enumerate(found)
        ]
    )  # fmt: skip


def test_differences_are_paired_by_plant_and_leave_out_what_one_did_not_score():
    rows = rows_of({"ours": [1, 1, 1, float("nan")], "gradient_norm": [0, 1, 0, 1], "random": [0.5] * 4})
    found = differences(rows, ("random", "gradient_norm", "no such")).set_index(["metric", "localizer", "against"])
    paired = found.loc[("hit@1", "ours", "gradient_norm")]
    assert paired["difference"] == pytest.approx((0.5 + 1) / 2)  # the bases' own means: (1 + 0) / 2 and 1
    assert (paired["n_bases"], paired["n_plants"]) == (2, 3)
    assert "no such" not in found.reset_index()["against"].tolist()
    table = summarize(rows).set_index(["group", "localizer", "metric"])
    assert table.loc[("all", "gradient_norm", "hit@1"), "value"] == pytest.approx(0.5)
    assert table.loc[("MLP", "ours", "MRR"), "n_plants"] == 3


def test_the_bench_scores_ranks_and_reuses_what_is_there(ladder, monkeypatch):
    found = bench.bench_planted(settings(), [ladder["m0"], ladder["m1"]])
    assert (found.ladder["reason"] == "").all()
    assert set(found.rows["localizer"]) == {"attribution_patching", "resample_ablation", "random", "depth prior"}
    assert found.rows.loc[found.rows["localizer"] != "random", "hit@1"].isin([0, 1]).all()
    assert found.rows.groupby("localizer")["plant"].nunique().eq(2).all()
    monkeypatch.setattr(planted_scores, "verify", None)
    for name in ("attribution_patching", "resample_ablation"):
        method = planted_scores.LOCALIZERS.get(name)
        monkeypatch.setitem(planted_scores.LOCALIZERS._methods, name, replace(method, function=_never(method.function)))
    again = bench.bench_planted(settings(), [ladder["m0"], ladder["m1"]])
    pd.testing.assert_frame_equal(again.rows, found.rows)
    other = settings(localizers=[{"method": "attribution_patching", "options": {"seed": 5}}])
    with pytest.raises(AssertionError, match="scored anew"):
        bench.bench_planted(other, [ladder["m0"]])


def test_a_localizer_that_cannot_score_a_plant_is_named_and_not_counted(ladder):
    lines = [{"method": "fact_lookup_probe", "options": {"folds": 99}}, {"method": "resample_ablation"}]
    found = bench.bench_planted(settings(localizers=lines), [ladder["m0"]])
    failed = found.rows.set_index("localizer").loc["fact_lookup_probe"]
    assert "99 folds" in failed["error"]
    assert isnan(failed["hit@1"])
    assert "fact_lookup_probe" not in set(found.summary["localizer"])
    assert (found.rows.loc[found.rows["localizer"] != "fact_lookup_probe", "error"] == "").all()


def _never(function):
    @wraps(function)  # the same options, or the score would be another one
    def fail(*_, **__):
        raise AssertionError("scored anew")

    return fail


def test_a_plants_scores_are_those_of_the_planted_model(ladder, models):
    model, _ = models
    checked = planted_scores.verify_plant(ladder["m1"])
    ((_, scores),) = planted_scores.score_plant(checked, settings(localizers=[{"method": "resample_ablation"}]).lines())
    with applied(model, load_edit(ladder["m1"])):
        expected = planted_scores.LOCALIZERS.get("resample_ablation").function(model, planted_facts(RECIPE)[1])
    np.testing.assert_allclose(scores.per_fact, expected.per_fact, atol=1e-5)
    assert planted_scores.read_facts(ladder["base"]) == planted_facts(RECIPE)


@pytest.mark.parametrize("name", preset_names(planted=True))
def test_the_presets_of_this_bench_validate(name):
    given = load_planted(name)
    assert given.name == name
    lines = [line.name for line in given.lines()]
    assert len(set(lines)) == len(lines)
    Recipe(**given.ladder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plants": ["m0+a0"]}, "MLPs"),
        ({"plants": ["a0.h1"]}, "MLPs"),
        ({"localizers": [{"method": "no_such"}]}, "unknown localizer"),
        ({"localizers": [{"method": "attribution_patching", "options": {"x": 1}}]}, "unknown option"),
        ({"localizers": [{"method": "attribution_patching"}] * 2}, "twice"),
        ({"held_out_seeds": [0, 1]}, "held_out"),
        ({"plant": ["m0"]}, "unknown key"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


def test_the_figure_shows_every_localizer_of_the_part_kept_out():
    good = [a_plant(part, seed) for seed in (0, 1) for part in ("m0", "m1")]
    rows = pd.DataFrame(bench.baselines(good, settings()))
    found = bench.PlantedBench(ladder=pd.DataFrame({"reason": ["", "", "", "x"]}), rows=rows)
    figure = planted_figure(found)
    assert "3 of 4 plants" in figure.layout.title.subtitle.text
    assert {trace.type for trace in figure.data} == {"scatter", "heatmap"}
    assert set(figure.data[-1].y) == {"random", "depth prior"}


def test_a_cell_is_right_in_component_and_role():
    def scored(values, roles=("subject", "last")):
        shared = {"method": "m", "metric": "logit_diff", "sign": "+", "components": (M0, M1), "roles": roles}
        return ComponentScores(**shared, per_fact=np.array(values, dtype=float))

    right = scored([[[0, 2], [3, 1]], [[0, 2], [3, 1]]])  # m1 at the subject
    assert cell_metrics(right, [M1], ["subject_last"]) == {"cell hit@1": 1, "role": 1}
    assert cell_metrics(right, [M1], ["last"]) == {"cell hit@1": 0, "role": 0}
    assert cell_metrics(right, [M0], ["last"]) == {"cell hit@1": 0, "role": 1}
    tied = scored([[[0, 3], [3, 1]]])
    assert cell_metrics(tied, [M1], ["subject_last"]) == {"cell hit@1": 0, "role": 1}
    signs = scored([[[0, 5], [3, 0]], [[0, -5], [3, 0]]])  # m0 at the last token cancels in the mean alone
    assert cell_metrics(signs, [M0], ["last"], "mean_of_abs")["cell hit@1"] == 1
    assert cell_metrics(signs, [M0], ["last"])["cell hit@1"] == 0
    assert isnan(cell_metrics(scored([[[1], [2]]], roles=("all",)), [M1], ["last"])["cell hit@1"])


def test_common_options_go_to_the_localizers_that_have_them_and_yield_to_their_own():
    lines = {line.name: line.options for line in load_planted("bench-planted").lines()}
    assert lines["relevance_patching"]["pairs_per_fact"] == lines["activation_patching"]["pairs_per_fact"] == 3
    assert "pairs_per_fact" not in lines["logit_lens"]
    own = {"method": "relevance_patching", "options": {"pairs_per_fact": 2}}
    settings = load_planted("bench-planted").model_dump() | {"localizers": [own], "every_localizer": False}
    assert [line.options["pairs_per_fact"] for line in PlantedSettings(**settings).lines()] == [2]
