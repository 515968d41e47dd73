"""Statistics over seeds, by hand and by what must not change them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from eval.analysis.statistics import (
    area_under_curve,
    images_to_threshold,
    iqm,
    iqm_interval,
    paired_difference,
    probability_of_improvement,
)

RNG = np.random.default_rng(1)


# ---- interquartile mean


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2, 100], 1.5),  # one of four at each end
        ([5, 1, 3], 3),  # floor(3 / 4) = 0 are cut
        ([9, 1, 2, 3, -50], 2),  # floor(5 / 4) = 1 at each end: 1, 2, 3 stay
        ([[0, 1], [2, 100]], 1.5),  # all tasks together
        ([7], 7),
    ],
)
def test_iqm_is_the_mean_of_the_middle_half(values: Any, expected: float) -> None:
    assert iqm(values) == expected


def test_iqm_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for _ in range(60):
        low, high = iqm_interval(RNG.normal(3.0, 1.0, 20))
        hits += low <= 3.0 <= high
    assert 50 <= hits <= 60


def test_iqm_interval_against_all_resamples() -> None:
    # All 4^4 equally likely resamples of four seeds; of four sorted values the middle two stay
    seeds = [1.0, 2.0, 4.0, 8.0]
    middles = [sum(sorted(chosen)[1:3]) / 2 for chosen in itertools.product(seeds, repeat=4)]
    expected = np.quantile(middles, [0.025, 0.975])
    np.testing.assert_allclose(iqm_interval(seeds), expected, atol=0.5)  # neighbouring values


def test_strata_are_resampled_by_themselves() -> None:
    # Two tasks without any spread: nothing to resample, however far apart they are.
    assert iqm_interval([[1, 1, 1], [9, 9, 9]]) == (5, 5)
    low, high = iqm_interval([1, 1, 1, 9, 9, 9])
    assert low < 5 < high


# ---- differences of methods


def test_paired_difference_by_hand() -> None:
    ours, theirs = [[2, 4], [4, 6]], [[1, 1], [1, 1]]
    difference, low, high = paired_difference(ours, theirs)
    assert difference == 3  # means 3 and 5 against 1
    assert (low, high) == (2, 4)  # both resampled seeds the first, or both the second
    assert paired_difference(theirs, ours) == (-3, -4, -2)


def test_paired_difference_against_all_resamples() -> None:
    # Seed means 0, 3, 9 against 1, 5: all 3^3 * 2^2 equally likely resamples
    ours, theirs = [[-1, 1], [2, 4], [9, 9]], [[1, 1], [4, 6]]
    drawn = [
        np.mean(a) - np.mean(b)
        for a in itertools.product((0, 3, 9), repeat=3)
        for b in itertools.product((1, 5), repeat=2)
    ]
    difference, *ends = paired_difference(ours, theirs)
    assert difference == pytest.approx(4 - 3)
    np.testing.assert_allclose(ends, np.quantile(drawn, [0.025, 0.975]), atol=1)


def test_items_that_all_share_widen_nothing() -> None:
    items = RNG.normal(0, 10, 50)
    seeds = RNG.normal(0, 0.1, (5, 1))
    _, low, high = paired_difference(items + seeds, items + seeds[::-1])
    assert high - low < 0.3


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
    assert probability_of_improvement([3, 4], [1, 2])[1:] == (1, 1)
    found, low, high = probability_of_improvement([1, 2, 3, 6], [2, 3, 4, 5])
    assert 0 <= low < found < high <= 1


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


@pytest.mark.parametrize("function", [iqm, iqm_interval])
def test_the_order_of_seeds_changes_nothing(function: Callable[[Any], Any]) -> None:
    values = RNG.normal(size=7)
    assert function(values) == pytest.approx(function(shuffled(values)), rel=1e-12)


@pytest.mark.parametrize(
    ("function", "shape"), [(paired_difference, (6, 4)), (probability_of_improvement, (6,))]
)
def test_the_order_of_seeds_changes_no_comparison(
    function: Callable[[Any, Any], Any], shape: tuple[int, ...]
) -> None:
    ours, theirs = RNG.normal(size=shape), RNG.normal(size=(5, *shape[1:]))
    found = function(shuffled(ours), shuffled(theirs))
    assert function(ours, theirs) == pytest.approx(found, rel=1e-12)


def test_one_seed_says_nothing_about_the_spread() -> None:
    assert all(math.isnan(v) for v in iqm_interval([1.0]))
    assert all(math.isnan(v) for v in iqm_interval([[1.0], [2.0]]))
    assert all(math.isnan(v) for v in paired_difference([[1.0, 2]], [[1.0, 2], [2, 3]])[1:])
    assert all(math.isnan(v) for v in probability_of_improvement([1.0], [2.0, 3])[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iqm([]), r"at least one seed, got shape \(0,\)"),
        (lambda: iqm(3), r"at least one seed, got shape \(\)"),
        (lambda: iqm(np.zeros((2, 2, 2))), r"\[tasks, S\], got \(2, 2, 2\)"),
        (lambda: iqm([1, 2, math.nan, 3]), r"finite numbers, got 1 others .* \(4,\)"),
        (lambda: iqm_interval([1, math.inf]), "finite numbers"),
        (lambda: paired_difference([[1, 2]], [[1]]), r"got \(1, 2\) and \(1, 1\)"),
        (lambda: paired_difference([1, 2], [1, 2]), r"got \(2,\) and \(2,\)"),
        (lambda: probability_of_improvement([[1]], [1]), r"got \(1, 1\) and \(1,\)"),
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


def test_the_same_numbers_give_the_same_interval() -> None:
    values = RNG.normal(size=(2, 5))
    assert iqm_interval(values) == iqm_interval(values)
    assert paired_difference(values, values) == paired_difference(values, values)
