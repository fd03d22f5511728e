"""Training, quality, counting and choosing of features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from mechunlearn import split_facts
from mechunlearn.activations import read
from mechunlearn.features.bundled import dictionary_of
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.formats import save_dictionary
from mechunlearn.features.objectives import OBJECTIVES
from mechunlearn.features.quality import dictionary_quality
from mechunlearn.features.selection import FEATURE_RULES, matched_at_random, select_features
from mechunlearn.features.statistics import FeatureStatistics, feature_statistics
from mechunlearn.features.texts import kinds_of, retained_texts, statements
from mechunlearn.features.token_rows import TokenRows, is_content, rows_of_texts
from mechunlearn.features.training import DictionaryRecipe, DictionaryTrainer
from mechunlearn.models import Model
from mechunlearn.prompts import encode
from mechunlearn.resumable import run_training

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def rows(model, tiny_facts) -> TokenRows:
    return rows_of_texts(model, statements(tiny_facts.facts), rows=8, length=32)


def trainer(model: Model, rows: TokenRows, **changed) -> DictionaryTrainer:
    recipe = DictionaryRecipe(**{"d_sae": 64, "k": 8, "steps": 12, "dead_after": 600, **changed})
    return DictionaryTrainer(model, HOOK, rows, recipe, text="facts")


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_killed_training_goes_on_bit_for_bit(model, rows, kind, killed_and_resumed, tmp_path: Path):
    whole = trainer(model, rows, kind=kind)
    run_training(whole, tmp_path / "whole", checkpoint_every=4)

    resumed = killed_and_resumed(lambda: trainer(model, rows, kind=kind), tmp_path / "parts", at=6, every=4)
    a, b = whole.dictionary().weights, resumed.dictionary().weights
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="another recipe"):
        run_training(trainer(model, rows, kind=kind, seed=1), tmp_path / "parts")


@pytest.mark.parametrize(
    ("kind", "sparsity"), [("topk", 0), ("batchtopk", 0), ("relu", 0.3), ("gated", 0.3), ("jumprelu", 0.2)]
)
def test_training_explains_the_activation_with_few_features(model, rows, kind, sparsity, tmp_path: Path):
    made = trainer(model, rows, kind=kind, steps=300, sparsity=sparsity, learning_rate=5e-3)
    before = dictionary_quality(model, made.dictionary(), rows, steps=range(500, 503))
    run_training(made, tmp_path, checkpoint_every=300)
    found = made.dictionary()
    after = dictionary_quality(model, found, rows, steps=range(500, 503))
    assert after["explained variance"] > max(0.5, before["explained variance"] + 0.2)
    assert 0 < after["L0"] < 32
    assert found.is_folded
    torch.testing.assert_close(found.weights["W_dec"].norm(dim=-1), torch.ones(64))
    if kind == "topk":
        assert after["L0"] <= 8


def test_a_perfect_dictionary_costs_nothing(model, rows):
    eye = torch.eye(32)
    weights = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]), "b_enc": torch.zeros(64)}
    perfect = Dictionary(kind="relu", weights=weights | {"b_dec": torch.zeros(32)}, hook_point=HOOK)
    found = dictionary_quality(model, perfect, rows, steps=range(2))
    assert found["explained variance"] == pytest.approx(1, abs=1e-6)
    assert found["loss recovered"] == pytest.approx(1, abs=1e-4)
    assert found["L0"] == pytest.approx(32, abs=0.1)
    nothing = replace(perfect, weights={**perfect.weights, "W_dec": 0 * perfect.weights["W_dec"]})
    assert dictionary_quality(model, nothing, rows, steps=range(2))["loss recovered"] == pytest.approx(0, abs=1e-4)


def test_dead_features_are_revived(model, rows):
    """With some features made dead at the start, revival brings back more of them than none does."""

    def alive(weight: float) -> int:
        made = trainer(model, rows, kind="topk", steps=120, revival_weight=weight, dead_after=300, learning_rate=1e-2)
        with torch.no_grad():
            made.weights["b_enc"][:32] = -8.0
        while made.step < made.steps:
            made.train_step()
        return int((made.silent_for[:32] < 1000).sum())

    assert alive(20.0) > alive(0.0) + 8


def test_rows_hold_every_token_once_an_epoch_and_repeat_for_a_step(model, tiny_facts):
    texts = statements(tiny_facts.facts)
    made = rows_of_texts(model, texts, rows=4, length=16, seed=3)
    flat = [token for row in encode(model, texts) for token in row]
    steps = len(flat) // 64
    epoch = torch.cat([made(step).flatten() for step in range(steps)])
    counts = np.bincount(flat, minlength=120) - np.bincount(epoch.numpy(), minlength=120)
    assert (counts >= 0).all()
    assert counts.sum() == len(flat) - steps * 64
    assert torch.equal(made(2), rows_of_texts(model, texts, rows=4, length=16, seed=3)(2))
    assert not torch.equal(made(steps), made(0)), "another order in the next epoch"
    with pytest.raises(ValueError, match="at least 64, one batch"):
        rows_of_texts(model, texts[:1], rows=4, length=16)


def test_counts_are_those_of_the_dense_features_whatever_the_batch(model, tiny_facts):
    texts = statements(tiny_facts.facts)[:40]
    g = torch.Generator().manual_seed(0)
    weights = {"W_enc": torch.randn(32, 20, generator=g), "W_dec": torch.randn(20, 32, generator=g)}
    weights |= {"b_enc": torch.full((20,), -6.0), "b_dec": torch.zeros(32)}
    dictionary = Dictionary(kind="relu", weights=weights, hook_point=HOOK)
    found = [feature_statistics(model, dictionary, texts, batch_size=size) for size in (1, 7, 64)]
    dense, norms = [], []
    for text in texts:
        ids = torch.tensor(encode(model, [text]))
        x = read(model, ids, ("block", 1))[is_content(model.tokenizer, ids)]
        dense.append(dictionary.encode(x))
        norms.append(x.norm(dim=-1))
    f = torch.cat(dense).double()
    for counted in found:
        assert counted.n_tokens == len(f)
        assert counted.n_texts == 40
        torch.testing.assert_close(counted.mean_square, f.square().mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(counted.squared_mean, f.mean(0).square(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(counted.fire_rate, (f > 0).double().mean(0), rtol=1e-3, atol=1e-3)
        assert counted.n_texts_on.tolist() == sum((one > 0).any(0).long() for one in dense).tolist()
        assert counted.mean_norm == pytest.approx(float(torch.cat(norms).mean()), rel=1e-5)
    assert (found[0].mean_square >= found[0].squared_mean - 1e-9).all()
    with pytest.raises(ValueError, match="without a single token"):
        feature_statistics(model, dictionary, [""])


def made_statistics(n_on: list[int], strength: list[float], n_texts_on: list[int] | None = None) -> FeatureStatistics:
    on, size = torch.tensor(n_on), torch.tensor(strength).double()
    return FeatureStatistics(
        n_tokens=1000, n_texts=100, total=on * size, total_squares=on * size**2, n_on=on,
        n_texts_on=torch.tensor(n_texts_on or [min(100, n) for n in n_on]), mean_norm=1.0,
    )  # fmt: skip


def test_rules_by_hand():
    """Features: 0 on in both, 1 strong on forget alone, 2 weak and frequent there, 3 on in retain, 4 never on."""
    forget = made_statistics([100, 20, 60, 1, 0], [1.0, 9.0, 1.0, 1.0, 0.0])
    retain = made_statistics([100, 1, 2, 90, 0], [1.0, 1.0, 1.0, 1.0, 0.0])
    assert select_features(forget, retain, "dsg", n=3, ratio_percentile=60.0) == (1, 2)
    assert select_features(forget, retain, "retain_sparsity", n=3, most_retained=0.01) == (2, 1)
    assert select_features(forget, retain, "count_difference", n=3) == (2, 1)
    assert select_features(forget, retain, "chi_squared", n=3) == (2, 1)
    with pytest.raises(ValueError, match="admits no feature"):
        select_features(retain, retain, "chi_squared", n=3)
    with pytest.raises(ValueError, match="unknown feature rule"):
        select_features(forget, retain, "chi", n=3)
    with pytest.raises(ValueError, match="unknown option"):
        select_features(forget, retain, "dsg", n=3, ratio=3.0)


def test_dsg_differs_by_its_importance():
    """E[f^2] prefers the rare and strong one, (E f)^2 the frequent and weak one."""
    forget = made_statistics([10, 100], [5.0, 1.0])
    retain = made_statistics([0, 0], [0.0, 0.0])
    chosen = {kind: select_features(forget, retain, "dsg", n=1, importance=kind, ratio_percentile=0.0)
              for kind in ("mean_square", "squared_mean")}  # fmt: skip
    assert chosen == {"mean_square": (0,), "squared_mean": (1,)}


def test_the_chi_squared_test_is_scipys_and_is_corrected():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 100, 50), rng.integers(0, 100, 50)
    forget, retain = (made_statistics([5] * 50, [1.0] * 50, list(map(int, n))) for n in (a, b))
    scores = FEATURE_RULES.get("chi_squared").function(forget, retain).numpy()
    p = [stats.chi2_contingency([[x, 100 - x], [y, 100 - y]]).pvalue for x, y in zip(a, b, strict=True)]
    expected = (stats.false_discovery_control(p) <= 0.05) & (a > b)
    assert ((scores > -np.inf) == expected).all()
    # of features that are on alike in both, next to none is called a topic's: 95% of such families have none
    null = rng.binomial(100, 0.3, (2, 200, 50))
    wrong = 0
    for x, y in zip(*null, strict=True):
        pair = (made_statistics([5] * 50, [1.0] * 50, list(map(int, n))) for n in (x, y))
        wrong += bool(torch.isfinite(FEATURE_RULES.get("chi_squared").function(*pair)).any())
    assert wrong <= 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("rule", FEATURE_RULES.names())
def test_rules_admit_only_what_is_on_in_text_to_forget(rule):
    rng = np.random.default_rng(1)
    n_on = [list(map(int, rng.integers(0, 60, 40))) for _ in range(2)]
    n_on[0][:10] = [0] * 10
    forget, retain = (made_statistics(n, list(rng.random(40))) for n in n_on)
    chosen = select_features(forget, retain, rule, n=40)
    assert not set(chosen) & set(range(10))
    assert len(set(chosen)) == len(chosen)


def test_random_features_are_others_that_are_on_as_often():
    rates = np.arange(0, 500, 5.0)
    chosen = (10, 50, 90)
    drawn = matched_at_random(chosen, rates, seed=0, nearest=6)
    assert len(set(drawn)) == 3
    assert not set(drawn) & set(chosen)
    assert all(abs(rates[a] - rates[b]) <= 20 for a, b in zip(chosen, drawn, strict=True))
    assert drawn == matched_at_random(chosen, rates, seed=0, nearest=6)
    with pytest.raises(ValueError, match="too many"):
        matched_at_random(tuple(range(60)), rates, seed=0)


def test_statements_hold_every_form_and_the_answer(tiny_facts):
    split = split_facts(tiny_facts, tiny_facts.facts[:12], seed=0)
    texts = statements(split.forget)
    assert all(any(fact.subject in text and fact.target_true in text for text in texts) for fact in split.forget)
    mixed = retained_texts(split.retain_train, n_neutral=5)
    assert set(statements(split.retain_train)) < set(mixed)
    assert len(mixed) == len(statements(split.retain_train)) + 5


def test_a_dictionary_is_found_by_its_path(model, tmp_path: Path):
    eye = torch.eye(32)
    made = Dictionary(
        kind="relu", weights={"W_enc": eye, "W_dec": eye, "b_enc": eye[0], "b_dec": eye[0]}, hook_point=HOOK
    )
    save_dictionary(made, tmp_path / "mine")
    assert dictionary_of(model, str(tmp_path / "mine")).hook_point == HOOK
    with pytest.raises(FileNotFoundError, match="no dictionary 'blocks"):
        dictionary_of(model, "blocks.9")
    with pytest.raises(ValueError, match=r"is of blocks\.\S+, got hook point blocks\.0"):
        dictionary_of(model, str(tmp_path / "mine"), "blocks.0.hook_resid_post")


def test_retained_texts_are_told_apart_by_what_they_state(tiny_facts):
    red = tiny_facts.where(lambda fact: fact.target_true == "red")
    split = split_facts(tiny_facts, red, seed=0)
    texts = retained_texts(split.retain_train, n_neutral=7, seed=3)
    kinds = kinds_of(texts, split.retain_train, {"colour"}, seed=3)
    near = [fact for fact in split.retain_train if fact.relation == "colour"]
    assert kinds.count("text") == 7
    assert {text for text, kind in zip(texts, kinds, strict=True) if kind == "near"} == set(statements(near, seed=3))
    assert kinds.count("far") > 0
