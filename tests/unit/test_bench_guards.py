"""The bench of guards: what it measures of an unedited model, its experiments, and that nothing is measured twice."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from mechunlearn.bench.guard_experiments import (
    EXPERIMENTS,
    dilution,
    filler,
    gate_threshold,
    names_of,
    requests,
    sequential,
)
from mechunlearn.bench.guard_ground import Ground
from mechunlearn.bench.guard_relearning import only_asked, relearned
from mechunlearn.bench.guards import GuardBench, bench_guards, summary
from mechunlearn.checkpoints import save_model
from mechunlearn.cli import app
from mechunlearn.edit.edits import applied
from mechunlearn.facts import split_facts
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.formats import load_dictionary, save_dictionary
from mechunlearn.metrics import perplexity, score_facts
from mechunlearn.organisms.neutral import neutral_text
from mechunlearn.prompts import encode
from mechunlearn.report.guards import guards_figure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dictionary of random directions, each on at some tokens."""
    path = tmp_path_factory.mktemp("dictionary") / "random"
    directions = torch.nn.functional.normalize(torch.randn(96, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights = {"W_enc": directions.T.clone(), "W_dec": directions, "b_dec": torch.zeros(32)}
    weights["b_enc"] = torch.full((96,), -1.5)
    save_dictionary(Dictionary(kind="relu", weights=weights, hook_point="blocks.1.hook_resid_post"), path)
    return str(path)


@pytest.fixture(scope="module")
def ground(knowing, tiny_facts, folder):
    red = tiny_facts.where(lambda fact: fact.target_true == "red")
    far = tuple(tiny_facts.of("city"))[:10]
    return Ground(model=knowing, split=split_facts(tiny_facts.of("colour"), red, n_retain_test=10), far=far,
                  dictionary=folder, topic="colour red", max_facts=8)  # fmt: skip


def weights_of(model):
    return {name: value.clone() for name, value in model.hf.state_dict().items()}


def test_of_the_unedited_model_it_measures_what_the_metrics_say(ground):
    found = ground.measured(None)
    assert found["forget"] == pytest.approx(score_facts(ground.model, ground.parts["forget"])["p_true"].mean())
    assert found["far"] == pytest.approx(score_facts(ground.model, ground.parts["far"])["p_true"].mean())
    assert found["perplexity"] == 1.0
    assert {fact.target_true for fact in ground.parts["near"]}.isdisjoint({"red"})
    assert len(ground.parts["near"]) == 8


def test_perplexity_is_over_that_of_the_model_without_the_guard(ground):
    fresh = replace(ground)  # which has measured nothing yet
    found = fresh.measured(ground.guard("random", mode="all_on_hot", strength=5.0))
    with applied(ground.model, ground.guard("random", mode="all_on_hot", strength=5.0)):
        inside = perplexity(ground.model, neutral_text(40, 1))
    assert found["perplexity"] == pytest.approx(inside / perplexity(ground.model, neutral_text(40, 1)))
    assert abs(found["perplexity"] - 1) > 0.01  # of the tiny model, which never read neutral text, it falls


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_measures_and_leaves_the_model_as_it_was(ground, name):
    before = weights_of(ground.model)
    rows = list(EXPERIMENTS[name](ground))
    assert rows, name
    shares = [
        value for _, _, found in rows for measure, value in found.items() if measure not in ("perplexity", "fluency")
    ]
    assert all(0 <= value <= 1 for value in shares)
    for arm, x, found in rows:
        if arm in ("removed", "gate alone") and "forget" in found and not (name == "dilution" and x):
            assert found["forget"] == ground.measured(None)["forget"]
    assert all(torch.equal(value, before[key]) for key, value in ground.model.hf.state_dict().items())


def test_a_gate_opens_oftener_at_a_higher_rate(ground):
    found = {(arm, x): values for arm, x, values in gate_threshold(ground) if arm == "dsg"}
    opened = [values["opens on near"] for _, values in sorted(found.items())]
    assert opened == sorted(opened)
    assert opened[-1] > opened[0]


def test_the_rate_achieved_is_that_of_each_kind_of_text(ground):
    found = {(arm, x): values for arm, x, values in gate_threshold(ground)}
    guard = ground.guard("dsg", false_positive_rate=0.1)
    achieved = found["dsg", 0.1]
    assert achieved["achieved"] == guard.gate.achieved_rate
    for kind in ("near", "text"):  # the split is of one relation
        assert achieved[f"achieved {kind}"] == guard.notes[f"opens on text to retain, {kind}"]
    counts = pd.Series(ground._evidence(ground.split, {"data_share": 1.0, "units": "residual"}).kinds)
    held_out = counts[len(counts) // 2 :].value_counts()
    mean = sum(held_out[kind] * achieved[f"achieved {kind}"] for kind in held_out.index) / held_out.sum()
    assert mean == pytest.approx(achieved["achieved"])


def test_a_guard_that_is_only_asked_acts_on_questions_and_not_on_training(ground):
    guard, ids = ground.guard("random", mode="all_on_hot", strength=5.0), torch.arange(3, 15)[None]
    with torch.no_grad():
        plain = ground.model.hf(ids).logits
        with applied(ground.model, guard):
            guarded = ground.model.hf(ids).logits
    assert not torch.allclose(plain, guarded, atol=1e-3)
    with only_asked(ground.model, guard):
        torch.testing.assert_close(ground.model.hf(ids).logits.detach(), plain)
        with torch.no_grad():
            torch.testing.assert_close(ground.model.hf(ids).logits, guarded)
    torch.testing.assert_close(ground.model.hf(ids).logits.detach(), plain)


def test_relearning_is_asked_through_the_guard_and_has_a_control(ground):
    found = {(arm, x): values["hidden"] for arm, x, values in relearned(ground)}
    ways = ("", ", trained without", ", other text")
    arms = {f"{guard}{how}" for guard in ("static", "dsg", "share") for how in ways}
    assert {arm for arm, _ in found} == {"removed", *arms}
    for guard in ("static", "dsg", "share"):
        with applied(ground.model, ground.guard(guard)):
            asked = ground.p_true(ground.split.forget_hidden)
        for how in ways:
            assert found[f"{guard}{how}", 0.0] == pytest.approx(asked)
    assert found["removed", 0.0] == ground.p_true(ground.split.forget_hidden)


def test_an_attacker_trains_with_the_guard_or_without_it_as_the_arm_says(ground, monkeypatch):
    """What the attacked model computes under gradients, and on what it is trained, of every arm."""
    ids, seen = torch.arange(3, 15)[None], []

    class Nothing:
        def hidden_scores(self):
            return {"a": 0.5}

    def attacked(model, split, *, sources, **options):
        seen.append((sources, model.hf(ids).logits.detach()))
        return Nothing()

    monkeypatch.setattr("mechunlearn.bench.guard_relearning.relearning", attacked)
    guard = ground.guard("random", mode="all_on_hot", strength=5.0)
    monkeypatch.setattr(Ground, "guard", lambda self, arm: guard)
    arms = [arm for arm, x, _ in relearned(ground) if x == 1]
    with torch.no_grad():
        plain = ground.model.hf(ids).logits
        with applied(ground.model, guard):
            guarded = ground.model.hf(ids).logits
    assert not torch.allclose(plain, guarded, atol=1e-3)
    for arm, (sources, logits) in zip(arms, seen, strict=True):
        assert sources == (("unrelated",) if arm.endswith("other text") else ("shown",))
        through = arm in ("static", "dsg", "share")
        torch.testing.assert_close(logits, guarded if through else plain)


def test_dictionaries_are_folded_for_strengths_in_residual_norms_alone(ground):
    assert ground.guard("static").dictionary.is_folded
    assert not ground.guard("static", units="features").dictionary.is_folded
    assert ground.guard("static").dictionary.is_folded


def test_every_request_is_of_the_model_without_the_others(ground):
    asked = requests(ground.split)
    alone = [ground.guard("static", split=split) for split in asked]
    with applied(ground.model, alone[0]), applied(ground.model, alone[1]):
        both = ground.p_true(ground.drawn(asked[1].forget))
    found = {(arm, x): values for arm, x, values in sequential(ground)}
    assert found["static", 2]["request 2"] == pytest.approx(both)
    assert found["static", 0]["request 1"] == pytest.approx(ground.p_true(ground.drawn(asked[0].forget)))


def test_filler_is_as_long_as_asked(ground):
    assert filler(ground.model, 0, 3) == ""
    for n in (4, 16):
        text = filler(ground.model, n, 3)
        assert text.endswith(" ")
        assert abs(len(encode(ground.model, [text])[0]) - n) <= 1
    assert [x for arm, x, _ in dilution(ground) if arm == "removed"] == [0, 4, 8, 16]  # 64 positions, 40 kept free


def test_requests_are_whole_answers(ground):
    asked = requests(ground.split)
    assert asked[0].forget == ground.split.forget
    assert len({fact.target_true for split in asked for fact in split.forget}) == len(asked) == 4
    assert not {fact.key for split in asked for fact in split.forget} & {fact.key for fact in asked[0].retain_train}
    few = replace(ground.split, retain_train=())
    assert len(requests(few)) == 1


def test_what_is_done_is_not_done_again(knowing, tiny_facts, folder, tmp_path):
    save_model(knowing, tmp_path / "model")
    red = tuple(tiny_facts.where(lambda fact: fact.target_true == "red"))
    bench = GuardBench(
        model=str(tmp_path / "model"), facts=tiny_facts, forget=red, far=(), dictionary=folder, max_facts=8
    )
    rows = bench_guards(bench, ("data_share",), 2, tmp_path / "out")
    assert set(rows["seed"]) == {0, 1}
    for path in (tmp_path / "out" / bench.digest()).glob("*.csv"):
        part = pd.read_csv(path)
        part.assign(value=0.25).to_csv(path, index=False)
    again = bench_guards(bench, ("data_share",), 2, tmp_path / "out")
    assert set(again["value"]) == {0.25}
    assert replace(bench, max_facts=9).digest() != bench.digest()


def test_the_summary_is_over_seeds_and_the_figure_names_the_arms():
    rows = pd.DataFrame(
        [("data_share", arm, x, seed, "forget", value + 0.1 * seed)
         for arm, value in (("static", 0.2), ("dsg", 0.5)) for x in (0.5, 1.0) for seed in range(3)],
        columns=pd.Index(["experiment", "arm", "x", "seed", "measure", "value"]),
    )  # fmt: skip
    found = summary(rows)
    first = found.iloc[0]
    assert (first["arm"], first["n_seeds"]) == ("static", 3)
    assert first["value"] == pytest.approx(0.3)
    assert first["upper"] - first["value"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)  # t of 2 degrees
    figure = guards_figure(found)
    assert {trace.name for trace in figure.data} == {"static", "dsg"}


def test_an_unknown_experiment_is_one_line():
    with pytest.raises(ValueError, match="experiment: got 'dilutoin', allowed: clamp_strength"):
        names_of(["dilutoin"])


@pytest.fixture
def saved(knowing, tiny_facts, folder, tmp_path):
    """A model folder, facts and those to forget as files, and a dictionary whose file names no hook point."""
    save_model(knowing, tmp_path / "model")
    colours = [fact for fact in tiny_facts.facts if fact.relation in ("colour", "city")]
    for name, facts in (("mine", colours), ("topic", [fact for fact in colours if fact.target_true == "red"])):
        pd.DataFrame(
            [(fact.subject, fact.relation, fact.prompt, fact.target_true) for fact in facts],
            columns=pd.Index(["subject", "relation", "prompt", "target_true"]),
        ).to_csv(tmp_path / f"{name}.csv", index=False)
    weights = load_dictionary(folder).weights
    np.savez(
        tmp_path / "params.npz",
        threshold=np.full(96, 0.1, dtype=np.float32),
        **{name: value.numpy() for name, value in weights.items()},
    )
    return tmp_path


def bench(*more):
    command = ["bench", "guards", "--model", "model", "--facts", "mine.csv", "--forgotten", "topic.csv", "--out", "out"]
    command += ["--dictionary", "params.npz", "--seeds", "1", "--workers", "1", "--max-facts", "8", "--device", "cpu"]
    return CliRunner().invoke(app, [*command, *more])


def test_the_command_measures_with_a_dictionary_whose_file_names_no_hook_point(saved, monkeypatch):
    monkeypatch.chdir(saved)
    refused = bench("--only", "data_share")
    assert "does not say which activation" in str(refused.exception)
    assert not (saved / "out").exists()
    made = bench("--hook", "blocks.1.hook_resid_post", "--only", "data_share")
    assert made.exit_code == 0, made.output
    rows = pd.read_csv(saved / "out" / "tables" / "rows.csv")
    assert set(rows["experiment"]) == {"data_share"}
    assert (saved / "out" / "tables" / "figure.html").is_file()


def test_a_model_that_knows_nothing_to_forget_is_one_line(saved, tiny_model, monkeypatch):
    monkeypatch.chdir(saved)
    save_model(tiny_model(), saved / "blank")
    refused = bench("--hook", "blocks.1.hook_resid_post", "--model", "blank")
    assert "knows none of the" in str(refused.exception)
    assert not (saved / "out").exists()


def test_without_a_topic_the_choice_by_descriptions_is_left_out(saved, monkeypatch):
    monkeypatch.chdir(saved)
    monkeypatch.setattr("mechunlearn.guards_stage.names_of", lambda names: names or ("zero_shot", "feature_rule"))
    hook = ("--hook", "blocks.1.hook_resid_post")
    made = bench(*hook)
    assert made.exit_code == 0, made.output
    assert "zero_shot is left out" in made.output
    assert set(pd.read_csv(saved / "out" / "tables" / "rows.csv")["experiment"]) == {"feature_rule"}
    assert "--topic" in str(bench(*hook, "--only", "zero_shot").exception)
    told = bench(*hook, "--only", "zero_shot", "--topic", "red")
    assert told.exit_code == 0, told.output
