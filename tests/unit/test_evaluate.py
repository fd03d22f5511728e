from dataclasses import replace

import pytest

from mechunlearn.edit.training import substituted
from mechunlearn.evaluate import evaluate, take_baseline
from mechunlearn.facts import with_edit_targets
from mechunlearn.metrics import score_facts


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


def test_the_original_compared_with_itself_is_undisturbed(model, tiny_split):
    result = evaluate(model, tiny_split, original=model, parts=("retain_test",), kinds=("prompt",))
    assert result.mean("text", "kl", "text") == 0.0
    assert result.mean("retain_test", "kl", "text") == 0.0
    assert result.mean("text", "perplexity_ratio", "text") == 1.0


def test_a_disturbed_model_differs_from_its_own_baseline(model, tiny_split):
    baseline = take_baseline(model, tiny_split)
    name, weight = next((n, p) for n, p in model.hf.named_parameters() if n.endswith("down_proj.weight"))
    with substituted(model, {name: 3 * weight.detach()}):
        result = evaluate(model, tiny_split, original=baseline, parts=("retain_test",), kinds=("prompt",))
    assert result.mean("text", "kl", "text") > 0


def test_means_are_those_of_the_scorer_and_every_part_and_form_is_there(model, tiny_split):
    result = evaluate(model, tiny_split)
    direct = score_facts(model, tiny_split.forget_hidden)
    assert result.mean("forget_hidden", "p_true") == pytest.approx(direct["p_true"].mean())
    assert result.mean("forget_hidden", "accuracy") == pytest.approx(direct["correct"].mean())
    assert result.mean("forget_hidden", "chance") == pytest.approx(0.25)
    assert set(result.rows["part"]) == {"forget_shown", "forget_hidden", "attack_dev", "retain_test", "same_subject"}
    assert set(result.rows["form"]) == {"prompt", "paraphrase:0", "question:0", "choice"}


def test_the_table_names_n_and_an_interval_around_each_mean(model, tiny_split):
    table = evaluate(model, tiny_split, max_facts=6).table()
    row = table[(table["part"] == "forget_hidden") & (table["form"] == "prompt") & (table["metric"] == "p_true")].iloc[
        0
    ]
    assert row["n"] == 6
    assert row["lower"] <= row["mean"] <= row["upper"]


def test_edit_success_is_measured_where_there_is_a_target(model, tiny_split):
    assert "p_new" not in set(evaluate(model, tiny_split, kinds=("prompt",)).rows["metric"])
    hidden = tuple(
        replace(fact, neighborhood=(("Cora Petrov lives in the city of", "Oslo"),))
        for fact in with_edit_targets(tiny_split.forget_hidden)
    )
    result = evaluate(model, replace(tiny_split, forget_hidden=hidden), parts=("forget_hidden",), kinds=("prompt",))
    assert 0 <= result.mean("forget_hidden", "p_new") <= 1
    assert 0 <= result.mean("forget_hidden", "neighborhood", "neighbor") <= 1


def test_unknown_parts_and_missing_numbers_are_named(model, tiny_split):
    with pytest.raises(ValueError, match="got part 'forgotten'"):
        evaluate(model, tiny_split, parts=("forgotten",))
    result = evaluate(model, tiny_split, parts=("retain_test",), kinds=("prompt",))
    with pytest.raises(ValueError, match="evaluation: nothing for"):
        result.mean("forget_hidden", "p_true")
