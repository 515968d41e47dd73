"""How sure a mean over seeds is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RESAMPLES = 9999
"""Bootstrap resamples: the end points are then good to about 3 % of a standard error."""

RNG_SEED = 0
"""The resamples are the same every time, so that figures can be compared byte for byte."""


def interval(values: Any, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Percentile bootstrap interval of the mean over seeds.

    Whole seeds are resampled, so a curve's rounds stay together. With fewer than about ten
    seeds such intervals are somewhat too narrow; with two or three they reach from the lowest to
    the highest seed, as no percentile bootstrap can be wider.

    Args:
        values: [S, ...] one entry for each of S seeds, in any unit.
        confidence: share of intervals that should hold the true mean, between 0 and 1.

    Returns:
        Low and high end, [...] each, in the unit of `values`; NaN with one seed, which says
        nothing about the spread.

    Raises:
        ValueError: there is no seed.
    """
    import numpy as np
    from scipy.stats import bootstrap

    seeds = np.asarray(values, dtype=np.float64)
    if seeds.ndim == 0 or len(seeds) == 0:
        raise ValueError(f"interval needs values [S, ...] of S >= 1 seeds, got {seeds.shape}")
    if len(seeds) == 1:
        nothing = np.full(seeds.shape[1:], np.nan)
        return nothing, nothing.copy()
    found = bootstrap(
        (seeds,), np.mean, axis=0, vectorized=True, method="percentile", batch=1000,
        n_resamples=RESAMPLES, confidence_level=confidence, rng=np.random.default_rng(RNG_SEED),
    ).confidence_interval  # fmt: skip
    return np.asarray(found.low), np.asarray(found.high)
