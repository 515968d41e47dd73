"""Whether two experiments put methods in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.analysis.statistics import finite_numbers

Floats = NDArray[np.float64]

DRAWS = 20_000


def rank_agreement(ours: Any, theirs: Any) -> tuple[float, float, float]:
    """Kendall's tau of the methods' means in two experiments, with a 95 % interval over seeds.

    tau is the share of pairs of methods that both experiments put in the same order, minus the
    share that they do not: -1 to 1. The interval is a generalised one (Weerahandi 1993, J. of the
    American Statistical Association 88, 899-905): where tau lies when the means of either
    experiment are drawn from what its seeds leave open, by Student's t with the covariance of its
    methods, which share seeds. What is drawn scatters more than the true means do, so where seeds
    say little the interval leans to 0.

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
    rng = np.random.default_rng(0)
    drawn = [_means(part, rng) for part in both]
    low, high = np.quantile(_tau(*drawn), (0.025, 0.975), method="inverted_cdf")
    return float(_tau(*(part.mean(0) for part in both))), float(low), float(high)


def _means(seeds: Floats, rng: np.random.Generator) -> Floats:
    """Means [DRAWS, M] that seeds [S, M] leave open."""
    count = len(seeds)
    errors = rng.normal(size=(DRAWS, count)) @ (seeds - seeds.mean(0))
    scale = np.sqrt(rng.chisquare(count - 1, (DRAWS, 1)) * count)
    found: Floats = seeds.mean(0) + errors / scale
    return found


def _tau(ours: Floats, theirs: Floats) -> Floats:
    """Of means [..., M]."""
    one, other = np.triu_indices(ours.shape[-1], 1)
    order = (np.sign(part[..., one] - part[..., other]) for part in (ours, theirs))
    found: Floats = np.prod(list(order), axis=0).mean(-1)
    return found
