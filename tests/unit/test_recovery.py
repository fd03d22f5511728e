import numpy as np
import pytest
from scipy import stats

from mechunlearn.comparison import compare_arms, holm, paired_p_value
from mechunlearn.recovery import area, recovery

STEPS = [0, 1, 4, 16, 64, 256]
ORIGINAL, NULL = 0.9, 0.1


def flat(height: float, curves: int = 1) -> np.ndarray:
    return np.full((curves, len(STEPS)), height)


def at_step(step: float, curves: int = 1) -> np.ndarray:
    """Nothing before `step`, everything from it on."""
    return np.where(np.asarray(STEPS) >= step, ORIGINAL, NULL) * np.ones((curves, 1))


def compare(edited: np.ndarray, twin: np.ndarray, **options):
    return recovery(STEPS, edited, twin, original=ORIGINAL, null=NULL, **options)


def test_the_area_is_0_for_the_twin_1_for_the_original_and_linear_between():
    rng = np.random.default_rng(0)
    twin = rng.random((3, len(STEPS)))
    assert compare(twin, twin).naurc == pytest.approx(0)
    assert compare(flat(ORIGINAL), flat(NULL)).naurc == pytest.approx(1)
    assert compare(twin + 0.3 * 0.8, twin).naurc == pytest.approx(0.3)


def test_the_area_is_exact_where_the_curve_is_straight_in_log_steps():
    steps = np.array([0.0, 3.0, 10.0, 99.0])
    assert area(steps, np.log1p(steps)[None])[0] == pytest.approx(np.log(100) / 2)


def test_checkpoints_between_do_not_change_the_area_of_the_same_curve():
    few, many = np.array([0.0, 15.0, 255.0]), np.array([0.0, 3.0, 15.0, 63.0, 255.0])
    assert area(few, np.log1p(few)[None]) == pytest.approx(area(many, np.log1p(many)[None]))


def test_steps_to_recover_are_the_first_checkpoint_there():
    curve = np.array([[0.1, 0.2, 0.5, 0.6, 0.8, 0.85]])
    half, most = compare(curve, flat(NULL)).steps
    assert (half.q, half.edited) == (0.5, 4)
    assert (most.q, most.edited) == (0.8, 64)


def test_savings_are_bounds_where_a_curve_never_gets_there():
    def savings(edited, twin):
        found = compare(edited, twin, quantiles=[0.5]).steps[0]
        return found.savings, found.savings_known

    assert savings(at_step(4), at_step(16)) == (0.75, "exact")
    assert savings(at_step(16), at_step(4)) == (-3.0, "exact")
    assert savings(at_step(64), flat(NULL)) == (0.75, "at least")
    assert savings(flat(NULL), at_step(64)) == (-3.0, "at most")
    assert savings(flat(NULL), flat(NULL)) == (None, "unknown")
    assert savings(at_step(4), flat(ORIGINAL)) == (None, "unknown")
    assert savings(flat(ORIGINAL), flat(NULL)) == (1.0, "exact")


def test_the_median_counts_curves_that_never_get_there():
    curves = np.concatenate([at_step(4), at_step(16), flat(NULL, 3)])
    half = compare(curves, flat(NULL, 5)).steps[0]
    assert (half.edited, half.edited_censored, half.twin_censored, half.n_curves) == (None, 3, 5, 5)
    assert compare(curves[:3], flat(NULL, 3)).steps[0].edited == 16


def test_the_log_rank_test_tells_models_apart_and_not_equal_ones():
    rng = np.random.default_rng(0)
    early = np.concatenate([at_step(s) for s in rng.choice([1, 4, 16], 20)])
    late = np.concatenate([at_step(s) for s in rng.choice([16, 64, 256], 20)])
    assert compare(early, late).steps[0].p_value < 0.001
    assert compare(early, early).steps[0].p_value == pytest.approx(1)
    assert compare(early[:1], late[:1]).steps[0].p_value is None
    assert compare(flat(NULL, 4), flat(NULL, 4)).steps[0].p_value is None


@pytest.mark.parametrize(
    ("steps", "edited", "original", "match"),
    [
        ([1, 2], np.zeros((1, 2)), 0.9, "rising from 0"),
        ([0, 5, 5], np.zeros((1, 3)), 0.9, "rising from 0"),
        ([0, 5], np.zeros((1, 3)), 0.9, "for 2 steps"),
        ([0, 5], np.full((1, 2), np.nan), 0.9, "finite"),
        ([0, 5], np.zeros((1, 2)), 0.1, "original above null"),
    ],
)
def test_curves_that_cannot_be_compared_are_refused(steps, edited, original, match):
    with pytest.raises(ValueError, match=match):
        recovery(steps, edited, np.zeros_like(edited), original=original, null=0.1)


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == pytest.approx([0.02])
    rng = np.random.default_rng(0)
    for p in rng.random((50, 6)) ** 3:
        order, rejected = np.argsort(p), np.zeros(6, dtype=bool)
        for i, k in enumerate(order):
            if p[k] > 0.05 / (6 - i):
                break
            rejected[k] = True
        assert ((holm(p) <= 0.05) == rejected).all()
    with pytest.raises(ValueError, match="allowed"):
        holm([float("nan")])


def test_the_paired_p_value_is_exact_for_few_facts_and_uniform_under_no_difference():
    assert paired_p_value([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]) == pytest.approx(2 / 2**5)
    rng = np.random.default_rng(0)
    found = [paired_p_value(*rng.random((2, 12)), resamples=199, seed=i) for i in range(300)]
    assert stats.kstest(found, "uniform").pvalue > 0.001
    with pytest.raises(ValueError, match="each of 2"):
        paired_p_value([1, 2], [1, 2, 3])


def test_arms_are_compared_on_the_same_facts_and_corrected_for_their_number():
    rng = np.random.default_rng(0)
    hard = rng.random(60)  # facts differ far more than arms do
    arms = {"random": hard, "better": hard + 0.02 + 0.01 * rng.normal(size=60), "same": rng.permutation(hard)}
    table = compare_arms(arms, against="random", resamples=999).set_index("arm")
    assert list(table.index) == ["better", "same"]
    assert table.loc["better", "difference"] == pytest.approx(np.mean(arms["better"] - hard))
    assert (table["lower"] < table["difference"]).all()
    assert (table["difference"] < table["upper"]).all()
    assert table.loc["better", "p"] < 0.01
    assert table.loc["same", "p"] > 0.5
    assert table.loc["better", "p_holm"] == pytest.approx(2 * table.loc["better", "p"])
    with pytest.raises(ValueError, match="allowed: one of random"):
        compare_arms({"random": hard, "better": hard}, against="all")
