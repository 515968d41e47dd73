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


def iqm(values: Any) -> float:
    """Interquartile mean over seeds: the mean of the middle half (Agarwal et al. 2021).

    As in rliable, `floor(n / 4)` of the sorted values are cut at each end, so up to three seeds
    give their mean.

    Args:
        values: [S] one number for each seed, or [tasks, S]: then of all of them together.

    Raises:
        ValueError: there is no number.
    """
    from scipy.stats import trim_mean

    flat = _numbers(values).ravel()
    return float(trim_mean(flat, 0.25))


def iqm_interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of `iqm`; seeds are resampled within each task.

    Args:
        values: [S], or [tasks, S] for strata.
        confidence: as in `interval`.

    Returns:
        Low and high end; NaN with one seed.

    Raises:
        ValueError: there is no number.
    """
    import numpy as np
    from scipy.stats import trim_mean

    tasks = np.atleast_2d(_numbers(values))
    if tasks.shape[1] == 1:
        return float("nan"), float("nan")
    rng = np.random.default_rng(RNG_SEED)
    picked = rng.integers(tasks.shape[1], size=(RESAMPLES, *tasks.shape))
    drawn = np.take_along_axis(tasks[None], picked, 2).reshape(RESAMPLES, -1)
    return _ends(trim_mean(drawn, 0.25, axis=1), confidence)


def paired_difference(
    ours: Any, theirs: Any, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean difference of two methods on the same prompts and noise, with its interval.

    The items are the same for all runs, so they are paired away and kept fixed; the seeds of the
    two methods are independent runs, so each method's are resampled by themselves. The interval is
    about other seeds on these prompts and this noise, not about other prompts.

    Args:
        ours: [S, N] scores of S seeds on N items.
        theirs: [R, N] scores of R seeds on the same items.
        confidence: as in `interval`.

    Returns:
        Mean difference, low and high end, in the unit of the scores; the ends are NaN where a
        method has one seed.

    Raises:
        ValueError: the numbers of items differ.
    """
    import numpy as np

    a, b = np.atleast_2d(_numbers(ours)), np.atleast_2d(_numbers(theirs))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"paired_difference needs the same items, got {a.shape} and {b.shape}")
    found = float((a.mean(0) - b.mean(0)).mean())
    if min(len(a), len(b)) == 1:
        return found, float("nan"), float("nan")
    rng = np.random.default_rng(RNG_SEED)
    means = [x.mean(1)[rng.integers(len(x), size=(RESAMPLES, len(x)))].mean(1) for x in (a, b)]
    return found, *_ends(means[0] - means[1], confidence)


def probability_of_improvement(
    ours: Any, theirs: Any, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Probability that a seed of one method ends above a seed of another, with its interval.

    Mann and Whitney's U over the number of pairs; a tie counts as half.

    Args:
        ours: [S] one number for each seed.
        theirs: [R].
        confidence: as in `interval`.

    Returns:
        Probability, low and high end; the ends are NaN where a method has one seed.
    """
    import numpy as np

    a, b = _numbers(ours), _numbers(theirs)
    wins = (np.sign(a[:, None] - b[None, :]) + 1) / 2
    if min(len(a), len(b)) == 1:
        return float(wins.mean()), float("nan"), float("nan")
    rng = np.random.default_rng(RNG_SEED)
    rows = rng.integers(len(a), size=(RESAMPLES, len(a)))
    columns = rng.integers(len(b), size=(RESAMPLES, len(b)))
    drawn = wins[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    return float(wins.mean()), *_ends(drawn, confidence)


def area_under_curve(x: Any, y: Any) -> Floats:
    """Mean height of a curve above its start, [...]: trapezoids over the range of x.

    Args:
        x: [n] increasing, such as images drawn.
        y: [..., n] score at each x.

    Raises:
        ValueError: fewer than two points, or x does not increase.
    """
    import numpy as np

    at, height = _numbers(x), _numbers(y)
    if len(at) < 2 or bool((np.diff(at) <= 0).any()) or height.shape[-1] != len(at):
        raise ValueError(f"area_under_curve needs increasing x [n >= 2] and y [..., n], got {at}")
    area = np.trapezoid(height - height[..., :1], at, axis=-1) / (at[-1] - at[0])
    return np.asarray(area)


def reaches(x: Any, y: Any, threshold: float, sign: int = 1) -> float:
    """The first x at which a curve reaches a threshold, such as images to a size.

    Between evaluations the curve is a straight line.

    Args:
        x: [n] increasing.
        y: [n] score at each x.
        threshold: in the unit of y.
        sign: 1 where larger is better, -1 where smaller is.

    Returns:
        In the unit of x; NaN if the curve never gets there.
    """
    import numpy as np

    at, height = _numbers(x), sign * (_numbers(y) - threshold)
    there = np.flatnonzero(height >= 0)
    if len(there) == 0:
        return float("nan")
    i = int(there[0])
    if i == 0:
        return float(at[0])
    share = -height[i - 1] / (height[i] - height[i - 1])
    return float(at[i - 1] + share * (at[i] - at[i - 1]))


def _numbers(values: Any) -> Floats:
    import numpy as np

    found = np.asarray(values, dtype=np.float64)
    if found.ndim == 0 or found.size == 0:
        raise ValueError(f"expected numbers of at least one seed, got shape {found.shape}")
    return found


def _ends(drawn: Floats, confidence: float) -> tuple[float, float]:
    """The percentiles that hold the middle `confidence` of bootstrap values."""
    import numpy as np

    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
