"""What few seeds can say: worked cases, other implementations, and simulations in which the truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from safe_lab.statistics import (
    Interval,
    correct,
    effect_size,
    find_side,
    mean_interval,
    p_value,
    seeds_needed,
    smallest_p,
    spread,
)

TEN = [0.3, -0.1, 0.2, 0.5, 0.1, 0.4, -0.2, 0.3, 0.6, 0.0]


def test_an_interval_of_few_values_is_students(few=(0.2, 0.5, 0.9)):
    found = mean_interval(few)
    expected = stats.ttest_1samp(few, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.method == "t"


def test_an_interval_of_eight_or_more_is_bca_with_widened_ends():
    found = mean_interval(TEN)
    assert found.method == "BCa"
    plain = stats.bootstrap((TEN,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    student = stats.ttest_1samp(TEN, 0).confidence_interval(0.95)
    assert found.low < plain.low < plain.high < found.high
    assert found.low == pytest.approx(student.low, abs=0.05)
    assert mean_interval(TEN) == found
    assert mean_interval(TEN, 0.8).low > found.low


def test_a_skewed_sample_has_a_skewed_interval():
    values = np.exp(np.linspace(-1, 2, 10))
    found = mean_interval(values)
    assert found.high - values.mean() > 1.2 * (values.mean() - found.low)


def test_values_without_spread_and_single_ones_have_no_interval_to_speak_of():
    assert mean_interval([0.25] * 9) == Interval(0.25, 0.25, 0.95, "all alike")
    assert mean_interval([0.0, 0.0]).method == "all alike"
    assert mean_interval([0.25]) is None
    assert spread([0.25]) is None
    assert p_value([0.25]) is None
    assert effect_size([0.25]) is None
    assert effect_size([0.25] * 3) is None
    # Alike but for rounding.
    assert effect_size([0.1] * 3) is None
    assert mean_interval([0.81 - 0.80, 0.82 - 0.81, 0.83 - 0.82]).method == "all alike"
    assert p_value([0.0] * 5) == 1.0


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("values", [TEN[:6], [0.5, 0.5, -0.5, 0.0, 0.0], [-0.1, -0.2, -0.3]])
def test_p_is_that_of_all_ways_to_put_the_signs(values, alternative):
    sums = [
        sum(s * abs(v) for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    seen = sum(values)
    extreme = [
        abs(total) >= abs(seen) - 1e-12 if alternative == "two-sided" else total >= seen - 1e-12 for total in sums
    ]
    assert p_value(values, alternative=alternative) == pytest.approx(sum(extreme) / len(sums))


@pytest.mark.parametrize("test", ["permutation", "wilcoxon"])
@pytest.mark.parametrize("num_rows", [872, 1043, 5463])
def test_ties_of_accuracies_are_not_broken_by_rounding(test, num_rows):
    rng = np.random.default_rng(num_rows)
    for _ in range(50):
        ours, theirs = rng.integers(0, 5, (2, 10)) + num_rows - 200
        assert p_value(ours / num_rows - theirs / num_rows, test=test) == p_value(ours - theirs, test=test)


def test_the_side_is_that_of_what_is_tested():
    one_far_out = [0.01, 0.02, 0.03, 0.04, -0.9]
    assert (find_side(one_far_out), find_side(one_far_out, "wilcoxon")) == (-1, 1)
    assert find_side([0.1 + 0.2, -0.3]) == find_side([0.1 + 0.2, -0.3], "wilcoxon") == 0


def test_an_interval_too_wide_for_the_resamples_is_students():
    assert mean_interval(TEN, 0.999).method == "t"
    assert mean_interval(TEN, 0.95).method == "BCa"


def test_p_of_signed_ranks_is_wilcoxons():
    values = [0.3, -0.11, 0.2, 0.5, 0.1, 0.4, -0.25, 0.35, 0.6]
    assert p_value(values, test="wilcoxon") == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)
    far_out = [0.1, 0.2, 0.3, 0.4, 0.5, -50.0]
    assert p_value(far_out, test="wilcoxon") < p_value(far_out) == 1.0


@pytest.mark.parametrize("num_seeds", [2, 5, 9, 14, 20])
@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("test", ["permutation", "wilcoxon"])
def test_no_p_is_smaller_than_the_smallest_and_differences_of_one_sign_reach_it(num_seeds, alternative, test):
    values = np.linspace(1, 2, num_seeds)
    assert p_value(values, test=test, alternative=alternative) == smallest_p(num_seeds, alternative)


def test_holms_correction_is_a_worked_one():
    # Sorted: 0.005 * 4, 0.011 * 3, 0.02 * 2, 0.04 * 1; none below the one before.
    assert correct([0.011, 0.02, 0.04, 0.005]) == pytest.approx([0.033, 0.04, 0.04, 0.02])
    assert correct([0.6, 0.7]) == [1.0, 1.0]
    assert correct([None, 0.02]) == [None, 0.02]
    assert correct([]) == []


def test_effect_size_is_hedges():
    # Mean 2, deviation 1; J of two degrees of freedom is gamma(1) / (sqrt(1) gamma(1/2)).
    assert effect_size([1.0, 2.0, 3.0]) == pytest.approx(2 / math.sqrt(math.pi))
    assert effect_size([-1.0, -2.0, -3.0]) == pytest.approx(-2 / math.sqrt(math.pi))


def test_seeds_needed_make_the_interval_as_narrow_as_was_asked():
    values = [0.1, 0.3, 0.2, 0.5]
    needed = seeds_needed(values, 0.05)
    half = [stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) for n in (needed - 1, needed)]
    assert half[1] <= 0.05 < half[0]
    assert seeds_needed(values, 1e-9) is None
    assert seeds_needed(values, 100.0) == 5
    assert seeds_needed([0.1], 0.05) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda rng: rng.normal(0.5, 2.0, 10), id="normal"),
        pytest.param(lambda rng: np.round(rng.normal(0.5, 2.0, 10)), id="in-steps"),
        pytest.param(lambda rng: 0.5 + rng.uniform(-3, 3, 10), id="uniform"),
    ],
)
def test_intervals_of_ten_seeds_hold_the_truth_as_often_as_they_say(draw):
    rng = np.random.default_rng(7)
    held = [found.low <= 0.5 <= found.high for found in (mean_interval(draw(rng)) for _ in range(1000))]
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("test", ["permutation", "wilcoxon"])
def test_after_correction_one_experiment_in_twenty_finds_something_where_there_is_nothing(test):
    rng = np.random.default_rng(3)
    false_positives = 0
    for _ in range(1000):
        # Five variants that share a baseline, as those of an experiment do, and the seeds' effect on all.
        runs = rng.normal(size=(6, 10)) + rng.normal(size=10)
        ps = [p_value(variant - runs[0], test=test) for variant in runs[1:]]
        false_positives += min(correct(ps)) <= 0.05
    assert false_positives / 1000 <= 0.05


def test_what_is_not_finite_is_refused():
    for function in (mean_interval, p_value):
        with pytest.raises(ValueError, match="only finite values have a mean"):
            function([0.1, float("nan"), 0.2])


@pytest.mark.slow
def test_a_true_effect_of_two_deviations_is_found():
    rng = np.random.default_rng(5)
    assert np.mean([p_value(rng.normal(2.0, 1.0, 10)) <= 0.05 for _ in range(300)]) > 0.95
