"""Statistics over seeds, by hand and by what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm, t, ttest_ind, ttest_rel

from eval.analysis.heights import area_under_curve, images_to_threshold
from eval.analysis.ranks import rank_agreement
from eval.analysis.statistics import (
    Difference,
    by_seed,
    difference,
    equivalence,
    from_zero,
    holm,
    interval,
    over_both,
    paired_difference,
    paired_seeds,
    probability_of_improvement,
    smallest_shown,
)

RNG = np.random.default_rng(1)


# ---- means and differences


def test_interval_by_hand() -> None:
    # mean 3, s = sqrt(10 / 4), t(4) = 2.7764: half = 2.7764 * 1.5811 / sqrt(5)
    low, high = interval([1, 2, 3, 4, 5])
    assert (low, high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)


def test_interval_of_a_curve_is_that_of_each_point() -> None:
    curve = RNG.normal(size=(5, 3))
    ends = np.transpose([interval(curve[:, i]) for i in range(3)])
    np.testing.assert_allclose(interval(curve), ends)


@pytest.mark.parametrize("count", [5, 20])
def test_intervals_hold_the_truth_as_often_as_they_say(count: int) -> None:
    # 20,000 draws: the share's own standard error is 0.15 %
    rng = np.random.default_rng(7)
    low, high = interval(rng.normal(3.0, 2.0, (count, 20_000)))
    assert 0.945 <= ((low <= 3) & (high >= 3)).mean() <= 0.955


def test_difference_by_hand() -> None:
    # variances 4 / 3 and 1 / 3 of the means, so 5 / 3 together; Welch's degrees of freedom 2.94
    found = difference([1, 3, 5], [0, 1, 2])
    assert found.mean == 2
    assert found.p == pytest.approx(ttest_ind([1, 3, 5], [0, 1, 2], equal_var=False).pvalue)
    assert (found.low + found.high) / 2 == pytest.approx(2)
    assert found.high - found.mean == pytest.approx(t.ppf(0.975, 2.9412) * (5 / 3) ** 0.5, rel=1e-3)


def test_paired_difference_by_hand() -> None:
    # 0.5, 0.6 and 0.4 apart: s = 0.1, and t(2) = 4.30265
    ours, theirs = [1.0, 1.5, 2.0], [0.5, 0.9, 1.6]
    found = paired_difference(ours, theirs)
    expected = (0.5, 0.25159, 0.74841, ttest_rel(ours, theirs).pvalue, 0.1 / 3**0.5, 2)
    assert found == pytest.approx(expected, rel=1e-4)
    assert from_zero(np.subtract(ours, theirs)) == pytest.approx(found)


def test_seeds_and_pictures_both_drawn_by_hand() -> None:
    # row means 1, 3 and column means 1, 3, 2 about 2; what is left is 1, -1, 0 and its negative
    found = over_both([[1.0, 1.0, 1.0], [1.0, 5.0, 3.0]])
    squares = np.array([6.0, 2.0, 2.0])  # 6 / 1, 4 / 2, 4 / 2
    error, freedom = (6 / 6) ** 0.5, 36 / (squares**2 / (1, 2, 2)).sum()
    expected = (2.0, error, freedom)
    assert (found.mean, found.error, found.freedom) == pytest.approx(expected)
    assert found.p == pytest.approx(2 * t.sf(2, freedom))


def test_intervals_over_seeds_and_pictures_hold_the_truth() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        seeds, pictures = rng.normal(0, 0.3, (5, 1)), rng.normal(0, 1, (1, 40))
        found = over_both(seeds + pictures + rng.normal(0, 1, (5, 40)))
        held += found.low < 0 < found.high
    assert 0.935 <= held / 1000 <= 0.97


@pytest.mark.parametrize(("apart", "p"), [(0.0, 1), (2.0, 0)])
@pytest.mark.parametrize("function", [difference, paired_difference])
def test_a_difference_that_all_seeds_share(
    function: Callable[..., Any], apart: float, p: float
) -> None:
    assert function([1.0, 1.0], [1.0 - apart, 1.0 - apart])[:5] == (apart, apart, apart, p, 0)
    found = paired_difference([1.0, 2.0], [1.0 - apart, 2.0 - apart])
    assert found[:5] == (apart, apart, apart, p, 0)
    assert equivalence(found, 1) == (apart > 1)
    assert smallest_shown(found) == 0


@pytest.mark.parametrize(("ours", "theirs"), [(5, 5), (5, 3), (2, 9)])
def test_a_difference_is_scipys(ours: int, theirs: int) -> None:
    a, b = RNG.normal(1, 2, ours), RNG.normal(0, 1, theirs)
    test = ttest_ind(a, b, equal_var=False)
    ends = test.confidence_interval()
    np.testing.assert_allclose(difference(a, b)[1:4], (ends.low, ends.high, test.pvalue))


def test_the_same_seeds_are_paired_in_any_order_and_others_are_not() -> None:
    ours, theirs = {0: 1.0, 1: 1.5, 2: 2.0}, {2: 1.6, 0: 0.5, 1: 0.9}
    assert by_seed(ours, theirs) == paired_difference([1.0, 1.5, 2.0], [0.5, 0.9, 1.6])
    more = theirs | {3: 9.0}  # has no partner
    assert by_seed(ours, more) == by_seed(ours, theirs)
    assert by_seed(more, ours) == by_seed(theirs, ours)
    assert (paired_seeds(more, ours), paired_seeds({1, 2}, {2, 3})) == ([0, 1, 2], [])
    others = {seed + 1: value for seed, value in theirs.items()}
    assert by_seed(ours, others) == difference([1.0, 1.5, 2.0], [0.5, 0.9, 1.6])


@pytest.mark.parametrize("margin", [0.1, 1.0, 3.0])
def test_equivalence_is_two_one_sided_tests(margin: float) -> None:
    a, b = RNG.normal(1, 1, 6), RNG.normal(0.5, 2, 5)
    below = ttest_ind(a + margin, b, equal_var=False, alternative="greater").pvalue
    above = ttest_ind(a - margin, b, equal_var=False, alternative="less").pvalue
    found = difference(a, b)
    assert equivalence(found, margin) == pytest.approx(max(below, above))
    ninety = difference(a, b, confidence=0.9)
    inside = -margin < ninety.low and ninety.high < margin
    assert (equivalence(found, margin) < 0.05) == inside


@pytest.mark.parametrize(
    ("error", "freedom", "expected"),
    [
        # Cohen's d for two-sided 5 % and 80 %, as G*Power has it: two groups of 5 and of 20 ...
        ((2 / 5) ** 0.5, 8, 2.0244), ((2 / 20) ** 0.5, 38, 0.9091),
        # ... and 5 and 20 pairs
        (5**-0.5, 4, 1.6820), (20**-0.5, 19, 0.6604),
    ],
)  # fmt: skip
def test_the_smallest_difference_that_is_shown(
    error: float, freedom: float, expected: float
) -> None:
    found = Difference(9.0, 0, 0, 0, error, freedom)  # whatever the difference was
    assert smallest_shown(found) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 * 0.01, 2 * 0.03, then no less than that
        ([0.6, 0.7], [1, 1]),
        ([math.nan, 0.02, 0.5], [math.nan, 0.04, 0.5]),
        ([], []),
    ],
)
def test_holm_by_hand(values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(holm(values), expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([3, 4], [1, 2], 1),
        ([1], [1], 0.5),
        # 2 > 1, 2 = 2 is half, 5 beats three: 4.5 of 6
        ([2, 5], [1, 3, 2], 0.75),
    ],
)
def test_probability_of_improvement_by_hand(
    ours: list[float], theirs: list[float], expected: float
) -> None:
    assert probability_of_improvement(ours, theirs)[0] == expected
    assert probability_of_improvement(theirs, ours)[0] == 1 - expected


def test_probability_of_improvement_is_u_over_pairs() -> None:
    ours, theirs = RNG.integers(0, 6, 7), RNG.integers(0, 6, 5)
    u = mannwhitneyu(ours, theirs).statistic
    assert probability_of_improvement(ours, theirs)[0] == pytest.approx(u / 35)


def test_interval_of_an_improvement() -> None:
    found, low, high = probability_of_improvement([3, 4], [1, 2])
    assert (found, high) == (1, 1)
    assert 0.2 < low < 0.9  # two seeds each do not prove that there will never be an exception
    turned = probability_of_improvement([1, 2], [3, 4])
    np.testing.assert_allclose(turned, (0, 0, 1 - low), atol=1e-9)
    found, low, high = probability_of_improvement([1, 2, 3, 6], [2, 3, 4, 5])
    assert 0 < low < found < high < 1


# ---- curves


def test_area_under_curve_by_hand() -> None:
    # above the start: 0, 2, 2; trapezoids 1 * 1 + 2 * 3 = 7 over a range of 4
    assert area_under_curve([0, 1, 4], [1, 3, 3]) == pytest.approx(7 / 4)
    assert area_under_curve([0, 1, 4], [1, 3, 3], above_start=False) == pytest.approx(11 / 4)
    assert area_under_curve([0, 1], [[1, 1], [0, 2]]).tolist() == [0, 1]


def test_area_does_not_depend_on_the_unit_of_x() -> None:
    y = RNG.normal(size=(2, 3, 4))
    found = area_under_curve([0, 1, 4, 9], y)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(area_under_curve([7, 9, 15, 25], y), found)


@pytest.mark.parametrize(
    ("y", "threshold", "sign", "expected"),
    [
        ([1.0, 1.0, 2.0], 1.5, 1, 150),  # half of the way from 100 to 200
        ([1.0, 1.0, 2.0], 0.5, 1, 0),  # there from the start
        ([1.0, 1.0, 2.0], 2.0, 1, 200),  # exactly at an evaluation
        ([1.0, 3.0, 0.0], 2.0, 1, 50),  # the first time, though it falls back
        ([2.0, 1.0, 0.0], 1.5, -1, 50),
        ([1.0, 1.0, 2.0], 2.5, 1, math.nan),
        ([1.0, 1.0, 2.0], 0.5, -1, math.nan),
    ],
)
def test_images_to_threshold(y: list[float], threshold: float, sign: int, expected: float) -> None:
    found = images_to_threshold([0, 100, 200], y, threshold, sign)
    np.testing.assert_array_equal(found, expected)


def test_images_to_threshold_of_each_seed() -> None:
    found = images_to_threshold([0, 100], [[0.0, 4.0], [0.0, 1.0]], 2)
    np.testing.assert_array_equal(found, [50, math.nan])


# ---- all of them


def shuffled(values: Any) -> Any:
    return np.random.default_rng(5).permutation(values)


@pytest.mark.parametrize("function", [difference, probability_of_improvement])
def test_the_order_of_seeds_changes_no_comparison(function: Callable[..., Any]) -> None:
    ours, theirs = RNG.normal(size=6), RNG.normal(size=5)
    found = function(shuffled(ours), shuffled(theirs))
    assert function(ours, theirs) == pytest.approx(found, rel=1e-12)


def test_two_seeds_show_large_differences_alone() -> None:
    """With one degree of freedom, the edge is divided by a normal number's absolute value."""
    two = from_zero([1.0, 2.0])
    edge = t.ppf(1 - 0.05 / 20 / 2, 1)
    expected = 0.5 * edge * norm.ppf(0.9)
    assert smallest_shown(two, 20) == pytest.approx(expected, rel=0.01)


def test_one_seed_says_nothing_about_the_spread() -> None:
    assert all(math.isnan(v) for v in difference([1.0], [2.0, 3])[1:])
    assert all(math.isnan(v) for v in paired_difference([1.0], [2.0])[1:])
    alone = from_zero([1.0])
    assert math.isnan(equivalence(alone, 1))
    assert math.isnan(smallest_shown(alone))
    assert all(math.isnan(v) for v in probability_of_improvement([1.0], [2.0, 3])[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: difference([], [1]), r"at least one seed, got shape \(0,\)"),
        (lambda: difference([1, math.nan], [1]), r"finite numbers, got 1 others .* \(2,\)"),
        (lambda: paired_difference([1, 2], [1]), "as many seeds .*: 2, 1"),
        (lambda: probability_of_improvement([[1]], [1]), r"each seed, got shape \(1, 1\)"),
        (lambda: area_under_curve([0], [1]), r"n >= 2 points, got \(1,\) and \(1,\)"),
        (lambda: area_under_curve([0, 0], [1, 1]), r"increasing x .* x = \[0. 0.\]"),
        (lambda: area_under_curve([1, 0], [1, 1]), "increasing x"),
        (lambda: area_under_curve([0, 1], [1, 2, 3]), r"got \(2,\) and \(3,\)"),
        (lambda: images_to_threshold([0, 1], [1], 1), r"got \(2,\) and \(1,\)"),
        (lambda: images_to_threshold([0, 1], [1, math.nan], 1), "finite numbers"),
    ],
)
def test_numbers_that_cannot_be_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- ranks


def test_equal_orders_agree_and_opposite_ones_do_not() -> None:
    seeds = np.random.default_rng(0).normal(0, 0.01, (5, 4)) + np.arange(4)
    assert rank_agreement(seeds, 10 * seeds) == (1, 1, 1)
    assert rank_agreement(seeds, -seeds) == (-1, -1, -1)
    swapped = seeds[:, [1, 0, 2, 3]]
    assert rank_agreement(seeds, swapped) == pytest.approx((4 / 6, 4 / 6, 4 / 6))  # 5 of 6, less 1


def test_a_pair_that_one_experiment_does_not_show_may_agree_or_not() -> None:
    """By hand: of three methods the first two are as good in one experiment."""
    clear = np.array([[0.0, 1, 2], [0.1, 1, 2], [0, 1.1, 2], [0, 1, 2.1]])
    open_ = np.array([[0.0, 0, 2], [0.3, 0.1, 2], [0, 0.4, 2], [0, 0, 2.1]])
    assert rank_agreement(clear, open_) == pytest.approx((1, 1 / 3, 1))
    noise = np.random.default_rng(0).normal(size=(2, 5, 4))
    assert rank_agreement(*noise)[1:] == (-1, 1)


def test_the_interval_of_ranks_holds_the_truth_at_least_as_often_as_it_says() -> None:
    """Methods that are nearly as good are in the same order, tau = 1, in both experiments."""
    rng = np.random.default_rng(0)
    for apart in (0.05, 1, 5):
        found = [rank_agreement(*(rng.normal(size=(2, 5, 4)) + apart * np.arange(4)))
                 for _ in range(100)]  # fmt: skip
        assert np.mean([low <= 1 <= high for _, low, high in found]) >= 0.95
    assert np.mean([low for _, low, _ in found]) > -0.5  # it says something


def test_what_methods_share_by_seed_leaves_their_order_sure() -> None:
    """A seed that is good for all of them moves no rank."""
    shared = np.random.default_rng(0).normal(0, 10, (5, 1)) + np.arange(3)
    assert rank_agreement(shared, shared + 1) == (1, 1, 1)


def test_ranks_need_seeds_and_the_same_methods() -> None:
    with pytest.raises(ValueError, match="at least two seeds"):
        rank_agreement(np.ones((1, 3)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="the same methods"):
        rank_agreement(np.ones((2, 3)), np.ones((2, 2)))
