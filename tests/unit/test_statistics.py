import numpy as np
import pytest
from scipy import stats

from mechunlearn.statistics import (
    bootstrap_means,
    chance_sd,
    exact_interval,
    expanded_alpha,
    facts_needed,
    hierarchical_interval,
    lower_bounds,
    mean_interval,
    seed_fact_table,
    seed_interval,
    simultaneous_lower_bounds,
    t_deviations,
    upper_bound,
    zero_of_n_bound,
)


def test_bootstrap_spread_equals_the_standard_error_for_one_seed():
    values = np.random.default_rng(0).normal(size=200)
    means = bootstrap_means(values[None], draws=8000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / np.sqrt(200), rel=0.05)


def test_the_same_facts_under_more_seeds_are_not_more_facts():
    values = np.random.default_rng(0).normal(size=100)
    one = bootstrap_means(values[None], draws=4000).std()
    ten = bootstrap_means(np.tile(values, (10, 1)), draws=4000).std()
    assert ten == pytest.approx(one, rel=0.05)


def test_other_facts_under_every_seed_are_judged_by_the_seed_means():
    rng = np.random.default_rng(1)
    table = np.full((5, 500), np.nan)
    for s in range(5):
        table[s, 100 * s : 100 * (s + 1)] = rng.normal(loc=s, size=100)
    means = bootstrap_means(table, draws=4000)
    by_seed = np.nanmean(table, axis=1)
    assert np.median(means) == pytest.approx(np.nanmean(table), abs=0.05)
    for level in (0.05, 0.2, 0.95):  # Student's t over the seed means
        exact = by_seed.mean() + stats.t.ppf(level, 4) * by_seed.std(ddof=1) / np.sqrt(5)
        assert np.quantile(means, level) == pytest.approx(exact, abs=0.15)


def test_spread_between_seeds_widens_the_interval():
    facts = np.random.default_rng(0).normal(size=100) * 0.1
    same = np.stack([facts] * 5)
    spread = same + np.arange(5)[:, None] * 0.1
    assert bootstrap_means(spread).std() > 3 * bootstrap_means(same).std()


def test_equal_seeds_give_equal_draws():
    values = np.random.default_rng(0).random((2, 30))
    assert np.array_equal(bootstrap_means(values, seed=3), bootstrap_means(values, seed=3))
    assert not np.array_equal(bootstrap_means(values, seed=3), bootstrap_means(values, seed=4))


def test_zero_of_n_bound_is_the_exact_one():
    for n in (8, 32, 256):
        exact = stats.binomtest(0, n).proportion_ci(confidence_level=0.9, method="exact").high
        assert zero_of_n_bound(n) == pytest.approx(exact)


def test_exact_interval_is_clopper_pearson():
    interval = exact_interval(3, 20)
    assert interval.lower == pytest.approx(stats.beta.ppf(0.025, 3, 18))
    assert interval.upper == pytest.approx(stats.beta.ppf(0.975, 4, 17))
    with pytest.raises(ValueError, match="got 3 of 2"):
        exact_interval(3, 2)


def test_upper_bound_never_claims_more_than_the_number_of_facts_allows():
    assert upper_bound(0.0, np.zeros(1000), 10) == pytest.approx(zero_of_n_bound(10), abs=1e-3)
    assert upper_bound(0.0, np.zeros(1000), 10) >= zero_of_n_bound(10)
    assert upper_bound(0.5, np.full(100, 0.5), 100_000) == pytest.approx(0.5, abs=1e-4)
    assert upper_bound(0.0, np.zeros(1000), 10, top=2.0) == pytest.approx(2 * zero_of_n_bound(10), abs=2e-3)


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (1, 32), (3, 32), (40, 64), (12, 256)])
def test_the_upper_bound_of_hits_and_misses_is_clopper_pearson(hits, n):
    values = np.arange(n) < hits
    exact = stats.binomtest(hits, n).proportion_ci(confidence_level=0.9, method="exact").high
    found = upper_bound(hits / n, bootstrap_means(values[None] * 1.0, draws=20_000), n)
    assert found == pytest.approx(exact, abs=0.01)
    both = mean_interval(values * 1.0, draws=20_000)
    assert (both.lower, both.upper) == pytest.approx((lambda i: (i.lower, i.upper))(exact_interval(hits, n)), abs=0.01)


def test_lower_bounds_of_one_attack_are_student_s_where_many_facts_spread_little():
    values = np.random.default_rng(0).normal(loc=0.5, scale=0.2, size=400)
    means = bootstrap_means(values[None], draws=10_000)
    lower = simultaneous_lower_bounds([values.mean()], means[None], 400)[0]
    exact = values.mean() - stats.t.ppf(0.95, 399) * values.std(ddof=1) / 20
    assert exact - 0.5 * zero_of_n_bound(400) < lower < exact  # an unseen fact costs something, but not all of that


def test_more_attacks_lower_every_bound_and_equal_attacks_cost_nothing():
    rng = np.random.default_rng(0)
    tables = [rng.normal(loc=0.5, scale=0.2, size=(1, 100)) for _ in range(5)]
    means = np.stack([bootstrap_means(table) for table in tables])
    shares = [float(table.mean()) for table in tables]
    alone = simultaneous_lower_bounds(shares[:1], means[:1], 100)[0]
    among_five = simultaneous_lower_bounds(shares, means, 100)[0]
    copies = simultaneous_lower_bounds(shares[:1] * 5, np.stack([means[0]] * 5), 100)[0]
    assert among_five < alone
    bonferroni = simultaneous_lower_bounds(shares[:1], means[:1], 100, alpha=0.05 / 5)[0]
    assert among_five >= bonferroni
    assert copies == pytest.approx(alone, abs=1e-3)


def test_simultaneous_bounds_hold_all_at_once_as_often_as_stated():
    rng = np.random.default_rng(0)
    misses = 0
    for trial in range(150):
        data = rng.normal(loc=0.3, scale=0.5, size=(4, 1, 150))
        means = np.stack([bootstrap_means(d, draws=1000, seed=trial) for d in data])
        misses += bool((simultaneous_lower_bounds(data.mean(axis=(1, 2)), means, 150) > 0.3).any())
    assert stats.binomtest(misses, 150, 0.05, alternative="greater").pvalue > 0.001


def test_upper_bound_of_rare_recovery_covers_as_often_as_stated():
    rng = np.random.default_rng(0)
    misses = 0
    for trial in range(200):  # 3% of the facts are fully recovered
        values = (rng.random((1, 64)) < 0.03).astype(float)
        misses += upper_bound(values.mean(), bootstrap_means(values, draws=500, seed=trial), 64) < 0.03
    assert misses <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)


def test_facts_needed_give_the_promised_power():
    rng = np.random.default_rng(0)
    n = facts_needed(sd=0.4, margin=0.1, share=0.0, power=0.8)
    assert n is not None
    below = 0
    for trial in range(400):
        values = rng.normal(scale=0.4, size=(1, n))
        below += np.quantile(bootstrap_means(values, draws=400, seed=trial), 0.95) < 0.1
    assert below / 400 == pytest.approx(0.8, abs=0.06)


def test_facts_needed_grow_with_spread_and_never_undercut_the_exact_bound():
    few, many = facts_needed(sd=0.1, margin=0.1), facts_needed(sd=0.5, margin=0.1)
    assert few is not None
    assert many is not None
    assert few < many
    none_spread = facts_needed(sd=0.0, margin=0.1)
    assert none_spread is not None
    assert zero_of_n_bound(none_spread) <= 0.1 < zero_of_n_bound(none_spread - 1)
    assert facts_needed(sd=1.0, margin=1e-6) is None
    with pytest.raises(ValueError, match="margin"):
        facts_needed(sd=0.1, margin=0.0)


def test_five_candidates_and_32_facts_cannot_settle_it_but_20_and_256_can():
    few = facts_needed(sd=chance_sd(5), margin=0.1, power=0.5)
    many = facts_needed(sd=chance_sd(20), margin=0.1)
    assert few is not None
    assert many is not None
    assert few > 32
    assert many < 256


def test_draws_of_an_error_are_student_s_t_and_stay_paired():
    values = np.random.default_rng(0).normal(size=4)
    drawn = t_deviations(values, draws=40_000, seed=0) / (values.std(ddof=1) / 2)
    assert stats.kstest(drawn, stats.t(3).cdf).pvalue > 0.001
    assert np.allclose(t_deviations(2 * values, draws=100, seed=1), 2 * t_deviations(values, draws=100, seed=1))
    assert np.allclose(t_deviations(np.full(3, 0.7), draws=10, seed=0), 0)


@pytest.mark.parametrize("n", [8, 32, 256])
def test_the_expanded_level_makes_the_bootstrap_student_s(n):
    values = np.random.default_rng(n).normal(size=n)
    means = bootstrap_means(values[None], draws=40_000)
    exact = values.mean() + stats.t.ppf(0.9, n - 1) * values.std(ddof=1) / np.sqrt(n)
    assert np.quantile(means, 1 - expanded_alpha(n, 0.1)) == pytest.approx(exact, abs=0.15 * values.std() / np.sqrt(n))
    assert expanded_alpha(n, 0.1) < 0.1


def test_no_bound_falls_when_one_fact_is_recovered_better():
    rng = np.random.default_rng(0)
    for _ in range(40):
        n = int(rng.choice([5, 30]))
        values = rng.normal(loc=rng.uniform(0, 1), scale=0.4, size=n)
        more = values + (np.arange(n) == rng.integers(n)) * rng.uniform(0, 1)
        low, high = bootstrap_means(values[None], draws=300), bootstrap_means(more[None], draws=300)
        assert upper_bound(more.mean(), high, n) >= upper_bound(values.mean(), low, n)
        before, after = (lower_bounds(np.array([v.mean()]), m[None], n)[0] for v, m in ((values, low), (more, high)))
        assert after >= before


def test_an_interval_over_seeds_and_facts_says_how_it_was_made():
    rng = np.random.default_rng(0)
    seeds, facts = rng.normal(size=(4, 1)), rng.normal(size=(1, 60))
    one = hierarchical_interval(facts)
    assert (one.method, one.n) == ("bootstrap over facts", 60)
    assert (one.lower, one.upper) == (mean_interval(facts[0], draws=4000).lower, mean_interval(facts[0]).upper)
    nested = np.where(np.arange(60) % 4 == np.arange(4)[:, None], facts + seeds, np.nan)
    other = hierarchical_interval(nested)
    assert other.method == "t over seed means"
    assert other.lower == seed_interval(np.nanmean(nested, axis=1)).lower
    same = hierarchical_interval(np.broadcast_to(facts, (4, 60)) + 0.0)
    assert "t over seed means" in same.method
    assert same.upper - same.lower == pytest.approx(one.upper - one.lower, rel=0.05)  # equal seeds add nothing
    spread = hierarchical_interval(seeds + facts)
    by_seed = seed_interval((seeds + facts).mean(axis=1))
    assert spread.upper - spread.lower > by_seed.upper - by_seed.lower  # and seed means alone leave the facts out
    assert "4 seeds" in spread.why
    with pytest.raises(ValueError, match="no values"):
        hierarchical_interval(np.full((2, 3), np.nan))


def test_all_hits_have_an_interval_and_values_without_limits_have_student_s():
    hits = mean_interval(np.ones(20))
    assert hits.upper == 1
    assert hits.lower == pytest.approx(exact_interval(20, 20).lower, abs=2e-3)
    nats = np.random.default_rng(0).normal(size=20) * 5
    assert mean_interval(nats) == seed_interval(nats)


def test_intervals_of_a_mean_hold_it_and_one_value_has_none():
    interval = mean_interval([0.0, 0.5, 1.0, 0.5])
    assert interval.lower < interval.value == 0.5 < interval.upper
    assert np.isnan(mean_interval([0.3]).lower)
    assert np.isnan(seed_interval([0.3]).upper)
    assert seed_interval([0.2, 0.4]).upper == pytest.approx(0.3 + stats.t.ppf(0.975, 1) * 0.1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_a_table_of_scores_refuses_what_is_not_one_finite_value_a_fact():
    table = seed_fact_table([0, 0, 1], ["a", "b", "a"], [0.1, 0.2, 0.3])
    assert table.shape == (2, 2)
    assert np.isnan(table[1, 1])
    with pytest.raises(ValueError, match="twice"):
        seed_fact_table([0, 0], ["a", "a"], [0.1, 0.2])
    with pytest.raises(ValueError, match="not finite"):
        seed_fact_table([0], ["a"], [float("nan")])
    with pytest.raises(ValueError, match="got 0 seeds"):
        seed_fact_table([], [], [])
