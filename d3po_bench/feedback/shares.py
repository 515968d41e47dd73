"""How sure a share is that rests on judgements which are not independent of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def clustered(
    hits: Sequence[float], clusters: Sequence[Any], most: int | None = None
) -> tuple[float, float]:
    """95 % interval of a mean of hits, 0 to 1, that come in clusters.

    Wilson's interval with Student's t for G clusters, and with as many independent hits as have
    the variance v of the mean between clusters: n = p (1 - p) / v, at most all hits.

        v = G / (G - 1) * sum over clusters of (sum of hit - p)^2 / hits^2

    Where v is 0, as with all hits right, each cluster counts once.

    Args:
        hits: [M].
        clusters: [M] which each belongs to.
        most: how many judgements there are, where a hit is a mean of several; None: M.

    Returns:
        Ends; NaN with fewer than two clusters, which say nothing about the spread.
    """
    from scipy.stats import t

    found = np.asarray(hits, dtype=np.float64)
    number = {name: n for n, name in enumerate(dict.fromkeys(clusters))}
    count = len(number)
    if count < 2:
        return math.nan, math.nan
    p = float(found.mean())
    sums = np.bincount([number[c] for c in clusters], found - p)
    variance = count / (count - 1) * float((sums**2).sum()) / len(found) ** 2
    n = min(p * (1 - p) / variance, most or len(found)) if variance > 1e-12 else count
    square = float(t.ppf(0.975, count - 1)) ** 2
    middle = (p + square / (2 * n)) / (1 + square / n)
    half = math.sqrt(square * (p * (1 - p) / n + square / (4 * n**2))) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)
