"""Whether two experiments put methods in the same order."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.analysis.statistics import finite_numbers, from_zero

LEVEL = 0.05


def rank_agreement(ours: Any, theirs: Any) -> tuple[float, float, float]:
    """Kendall's tau of the methods' means in two experiments, with a 95 % interval over seeds.

    tau is the share of pairs of methods that both experiments put in the same order, minus the
    share that they do not: -1 to 1. Within an experiment, methods share seeds. The interval reaches
    over every tau that fits the orders which paired t-tests show, at 5 % over all tests of both
    (Bonferroni): a pair that is not shown in both may agree or not. So it holds the tau of the true
    means at least as often as 95 %; where the seeds show nothing it is -1 to 1.

    Args:
        ours: [S, M] a number for each of S >= 2 seeds and M >= 2 methods.
        theirs: [R, M] of the same methods, from runs of their own.

    Returns:
        tau, and the low and high end of its interval.

    Raises:
        ValueError: there are fewer seeds or methods, or not the same number of methods.
    """
    both = finite_numbers(ours), finite_numbers(theirs)
    if any(part.ndim != 2 or min(part.shape) < 2 for part in both):
        raise ValueError("ranks need at least two seeds and two methods")
    if both[0].shape[1] != both[1].shape[1]:
        raise ValueError("ranks need the same methods of both experiments")
    (order, shown), (other, also) = map(_orders, both)
    same, known = order * other, shown & also
    low, high = (float(np.where(known, same, end).mean()) for end in (-1, 1))
    return float(same.mean()), low, high


def _orders(seeds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Of each pair of methods, -1 or 1 for its order by the means of [S, M], and if it is shown."""
    tests = [from_zero(one - other) for one, other in combinations(seeds.T, 2)]
    order = np.sign([test.mean for test in tests])
    return order, np.array([test.p < LEVEL / (2 * len(tests)) for test in tests])
