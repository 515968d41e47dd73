"""Statistics over seeds, by hand and by what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.statistics import (
    area_under_curve,
    iqm,
    iqm_interval,
    paired_difference,
    probability_of_improvement,
    reaches,
)

RNG = np.random.default_rng(1)


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert iqm([0, 1, 2, 100]) == 1.5
    assert iqm([5, 1, 3]) == 3  # floor(3 / 4) = 0 are cut
    assert iqm([9, 1, 2, 3, -50]) == 2  # one at each end
    assert iqm([[0, 1], [2, 100]]) == 1.5


def test_iqm_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for _ in range(60):
        low, high = iqm_interval(RNG.normal(3.0, 1.0, 20))
        hits += low <= 3.0 <= high
    assert 50 <= hits <= 60


def test_strata_are_resampled_by_themselves() -> None:
    # Two tasks without any spread: nothing to resample, however far apart they are.
    assert iqm_interval([[1, 1, 1], [9, 9, 9]]) == (5, 5)
    low, high = iqm_interval([1, 1, 1, 9, 9, 9])
    assert low < 5 < high


def test_paired_difference_by_hand() -> None:
    ours, theirs = [[2, 4], [4, 6]], [[1, 1], [1, 1]]
    difference, low, high = paired_difference(ours, theirs)
    assert difference == 3  # means 3 and 5 against 1
    assert (low, high) == (2, 4)  # both resampled seeds the first, or both the second
    assert paired_difference(theirs, ours)[0] == -3


def test_items_that_all_share_widen_nothing() -> None:
    items = RNG.normal(0, 10, 50)
    seeds = RNG.normal(0, 0.1, (5, 1))
    _, low, high = paired_difference(items + seeds, items + seeds[::-1])
    assert high - low < 0.3


def test_probability_of_improvement_by_hand() -> None:
    assert probability_of_improvement([3, 4], [1, 2]) == (1, 1, 1)
    assert probability_of_improvement([1], [1])[0] == 0.5
    # of (2, 5) against (1, 3, 2): 2 > 1, 2 = 2 is half, 5 beats three: 4.5 of 6
    assert probability_of_improvement([2, 5], [1, 3, 2])[0] == 0.75
    forth, back = (
        probability_of_improvement(a, b) for a, b in (([2, 5], [3, 4]), ([3, 4], [2, 5]))
    )
    assert forth[0] + back[0] == 1


def test_area_under_curve_by_hand() -> None:
    # above the start: 0, 2, 2; trapezoids 1 * 1 + 2 * 3 = 7 over a range of 4
    assert area_under_curve([0, 1, 4], [1, 3, 3]) == pytest.approx(7 / 4)
    assert area_under_curve([0, 1], [[1, 1], [0, 2]]).tolist() == [0, 1]


def test_images_to_a_threshold() -> None:
    x, y = [0, 100, 200], [1.0, 1.0, 2.0]
    assert reaches(x, y, 1.5) == 150
    assert reaches(x, y, 0.5) == 0
    assert math.isnan(reaches(x, y, 2.5))
    assert reaches(x, [2.0, 1.0, 0.0], 1.5, sign=-1) == 50


@pytest.mark.parametrize("function", [iqm, lambda v: iqm_interval(v)[0]])
def test_the_order_of_seeds_does_not_matter(function: object) -> None:
    values = RNG.normal(size=7)
    assert callable(function)
    assert function(values) == pytest.approx(function(values[::-1]), abs=0.1)


def test_one_seed_says_nothing_about_the_spread() -> None:
    assert all(math.isnan(v) for v in iqm_interval([1.0]))
    assert all(math.isnan(v) for v in paired_difference([[1.0, 2]], [[1.0, 2], [2, 3]])[1:])
    assert all(math.isnan(v) for v in probability_of_improvement([1.0], [2.0, 3])[1:])


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="the same items"):
        paired_difference([[1.0, 2]], [[1.0]])
    with pytest.raises(ValueError, match="at least one seed"):
        iqm([])
    for x in ([0], [0, 0], [1, 0]):
        with pytest.raises(ValueError, match="increasing x"):
            area_under_curve(x, [1.0] * len(x))


def test_the_same_numbers_give_the_same_interval() -> None:
    values = RNG.normal(size=(2, 5))
    assert iqm_interval(values) == iqm_interval(values)
