"""The bounds that decide verdicts hold as often as they say, and as many facts as planned suffice."""

import time

import numpy as np
import pytest
from scipy import stats

from mechunlearn.bench import coverage
from mechunlearn.evidence import AttackEvidence, PositiveControl
from mechunlearn.power import facts_for_power, power, power_table
from mechunlearn.statistics import chance_sd
from mechunlearn.verdict import decide


@pytest.mark.parametrize("part", [coverage.bounds, coverage.four_at_once, coverage.proxy_null])
def test_bounds_that_decide_hold_as_often_as_stated(part):
    table = coverage.table(list(part(np.random.default_rng(0), 2000, 64)))
    assert len(table) >= 2
    assert table["holds"].all(), table[~table["holds"]].to_string()


def test_intervals_hold_as_often_as_stated():
    rng = np.random.default_rng(1)
    table = coverage.table([*coverage.two_sided(rng, 300, 64), *coverage.few_seeds(rng, 200, 32)])
    used = table[~table["interval"].str.startswith("not used")]
    assert (used["upper"] > 0.95).all(), used.to_string()
    avoided = table[table["interval"] == "not used: t over seed means alone"]
    assert avoided["coverage"].min() < 0.5  # what the others are there to avoid


def test_a_bound_that_is_too_narrow_is_seen():
    sample, truth = coverage.SHARES["rare recovery 10%"]
    values = sample(np.random.default_rng(0), (2000, 64))
    bound = values.mean(axis=1) + 1.645 * values.std(axis=1) / 8
    row = coverage.table([("normal", "rare", 64, bound >= truth, bound)]).iloc[0]
    assert not row["holds"]
    assert row["upper"] < 0.94


def simulated(*, effect: float, k: int, n: int, attacks: int, trial: int) -> list[AttackEvidence]:
    rng = np.random.default_rng(trial)
    entries = []
    for a in range(attacks):
        known = rng.random(n) < (effect if a == 0 or effect < 0.1 else 0)
        edited, twin = (known | (rng.random(n) < 1 / k)) * 1.0, (rng.random(n) < 1 / k) * 1.0
        facts = tuple(f"fact {i}" for i in range(n))
        name = f"attack {a}"
        entries.append(AttackEvidence(name=name, facts=facts, seeds=(0,) * n, edited=tuple(edited), null=tuple(twin)))
    return entries


@pytest.mark.parametrize(("effect", "k", "n"), [(0.0, 20, 100), (0.02, 20, 150), (0.25, 5, 190), (0.25, 20, 70)])
def test_power_is_how_often_decide_reaches_the_true_verdict(effect, k, n):
    controls = (PositiveControl(kind="lora", recovered_by=("attack 0", "attack 1", "attack 2")),)
    aim = "removed" if effect < 0.1 else "hidden"
    reached = 0
    for trial in range(100):
        evidence = simulated(effect=effect, k=k, n=n, attacks=3, trial=trial)
        reached += decide(evidence, original=1.0, null_before=1 / k, controls=controls, draws=500).label == aim
    planned = power(n_facts=n, effect=effect, n_candidates=k, n_attacks=3)
    assert stats.binomtest(reached, 100, np.clip(planned, 0.01, 0.99)).pvalue > 0.001


def test_32_facts_of_five_candidates_cannot_show_removal_but_256_of_twenty_can():
    for attacks in (1, 4):
        few = power_table(n_facts=32, n_candidates=5, n_attacks=attacks).iloc[0]
        many = power_table(n_facts=256, n_candidates=20, n_attacks=attacks).iloc[0]
        assert (few["verdict"], many["verdict"]) == ("removed", "removed")
        assert few["power"] < 0.2
        assert few["facts needed"] > 256
        assert many["power"] > 0.9
        assert many["facts needed"] < 256


@pytest.mark.parametrize(("effect", "attacks"), [(0.0, 1), (0.02, 5), (0.25, 1), (0.25, 5), (1.0, 5)])
def test_the_facts_needed_give_the_power_asked_for_and_fewer_do_not(effect, attacks):
    n = facts_for_power(effect=effect, n_candidates=20, n_attacks=attacks)
    assert n is not None

    def at(n):
        return power(n_facts=n, effect=effect, n_candidates=20, n_attacks=attacks, seed=7)

    assert at(n) > 0.74
    assert at(max(1, round(0.7 * n) - 1)) < 0.8


def test_what_makes_it_harder_needs_more_facts():
    base = facts_for_power(effect=0.02, n_candidates=20)
    assert facts_for_power(effect=0.02, n_candidates=5) > base
    assert facts_for_power(effect=0.05, n_candidates=20) > base
    assert facts_for_power(effect=0.02, n_candidates=20, n_attacks=6) > base
    assert facts_for_power(effect=0.02, n_candidates=20, sd=0.1) < base
    assert facts_for_power(effect=0.02, n_candidates=20, delta=0.3) < base
    assert facts_for_power(effect=0.09, n_candidates=2) > 2000
    assert facts_for_power(effect=0.1 + 1e-9, n_candidates=2) is None


def test_a_measured_spread_equal_to_guessing_changes_nothing():
    options = {"n_facts": 100, "effect": 0.0, "n_candidates": 10}
    assert power(**options, sd=chance_sd(10)) == power(**options)
    assert power(**options, sd=0.1) > power(**options)


def test_a_table_is_made_while_one_waits():
    power_table(n_facts=50, n_candidates=5)
    start = time.process_time()
    power_table(n_facts=256, n_candidates=20, n_attacks=6)
    assert time.process_time() - start < 2  # half a second on a laptop


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_facts": 0}, "got 0 facts"),
        ({"n_candidates": 1}, "1 candidates"),
        ({"effect": 1.5}, "effect 1.5"),
        ({"effect": 0.1}, "no verdict is true"),
        ({"sd": float("nan")}, "sd nan"),
    ],
)
def test_power_refuses_what_is_out_of_range(change, match):
    with pytest.raises(ValueError, match=match):
        power(**({"n_facts": 10, "effect": 0.0, "n_candidates": 5} | change))
