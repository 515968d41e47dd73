"""How sure a mean over seeds is."""

from __future__ import annotations

import math
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


def between(middle: float, low: float, high: float) -> str:
    """A number with its interval, for tables; without one where its ends are NaN."""
    return f"{middle:+.3f}" + ("" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})")


def iqm(values: Any) -> float:
    """Interquartile mean over seeds: the mean of the middle half (Agarwal et al. 2021).

    As in rliable's `aggregate_iqm`: of all n values together, sorted, floor(n / 4) are cut at each
    end, and none in part. So up to three seeds give their plain mean.

    Args:
        values: [S] one number for each seed, or [tasks, S] in a unit that the tasks share.

    Returns:
        In the unit of `values`.

    Raises:
        ValueError: there is no number, one is not finite, or the shape is another.
    """
    return float(_trimmed(_tasks(values).ravel()))


def iqm_interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of `iqm`; seeds are resampled within each task.

    As in rliable, the tasks are kept: the interval is about other seeds, not about other tasks.

    Args:
        values: [S], or [tasks, S] for strata.
        confidence: as in `interval`.

    Returns:
        Low and high end, in the unit of `values`; NaN with one seed.

    Raises:
        ValueError: as in `iqm`.
    """
    import numpy as np

    tasks = np.sort(_tasks(values), axis=1)
    if tasks.shape[1] == 1:
        return float("nan"), float("nan")
    rng = np.random.default_rng(RNG_SEED)
    picked = rng.integers(tasks.shape[1], size=(RESAMPLES, *tasks.shape))
    drawn = np.take_along_axis(tasks[None], picked, 2).reshape(RESAMPLES, -1)
    return _ends(_trimmed(drawn), confidence)


def paired_difference(
    ours: Any, theirs: Any, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean difference of two methods on the same prompts and noise, with its interval.

    Items are the same in all runs, so how hard one is cancels and items are kept fixed. Seeds are
    runs of their own, so those of each method are resampled independently, even where their
    numbers are equal: what equal seeds share (prompts, first noise) makes the interval rather too
    wide than too narrow. It covers what other seeds would give on these items. It does not cover
    other prompts or other noise, nor how the settings of the two methods were chosen.

    Args:
        ours: [S, N] held-out scores of S seeds on N items.
        theirs: [R, N] of R seeds on the same items, in the same order.
        confidence: as in `interval`.

    Returns:
        Mean of ours minus theirs, low and high end, in the unit of the scores; the ends are NaN
        where a method has one seed.

    Raises:
        ValueError: the items differ in number, or a score is missing or not finite.
    """
    import numpy as np

    a, b = _numbers(ours), _numbers(theirs)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            "paired_difference needs scores [S, N] and [R, N] of the same items, got "
            f"{a.shape} and {b.shape}"
        )
    found = float((a.mean(0) - b.mean(0)).mean())
    if min(len(a), len(b)) == 1:
        return found, float("nan"), float("nan")
    rng = np.random.default_rng(RNG_SEED)
    ours_drawn, theirs_drawn = (_resampled(np.sort(x.mean(1)), rng).mean(1) for x in (a, b))
    return found, *_ends(ours_drawn - theirs_drawn, confidence)


def probability_of_improvement(
    ours: Any, theirs: Any, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Probability that a seed of one method ends above a seed of another, with its interval.

    Mann and Whitney's U over the number of pairs; a tie counts as half. Of one task, in rliable's
    words. The seeds of each method are resampled independently.

    Args:
        ours: [S] one number for each seed; negate both where smaller is better.
        theirs: [R].
        confidence: as in `interval`.

    Returns:
        Probability, low and high end, 0 to 1; the ends are NaN where a method has one seed, and
        meet where the seeds do not overlap: no resample of them can.

    Raises:
        ValueError: there is no seed, or a number is not finite.
    """
    import numpy as np

    a, b = np.sort(_numbers(ours)), np.sort(_numbers(theirs))
    if a.ndim != 1 or b.ndim != 1:
        raise ValueError(
            f"probability_of_improvement needs [S] and [R], got {a.shape} and {b.shape}"
        )
    found = float(_wins(a, b))
    if min(len(a), len(b)) == 1:
        return found, float("nan"), float("nan")
    rng = np.random.default_rng(RNG_SEED)
    drawn = _wins(_resampled(a, rng), _resampled(b, rng))
    return found, *_ends(drawn, confidence)


def another_seed(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Where one more seed lies: Student's prediction interval from the seeds that there are.

        mean +- t(n - 1) * s * sqrt(1 + 1 / n)

    Exact for a seed that is independent of the n and as normal as they are. One that resembles a
    seed among them, being that seed made again, lies in it more often.

    Args:
        values: [S] one number for each of S >= 2 seeds.
        confidence: share of further seeds within.

    Returns:
        Low and high end, in the unit of `values`.

    Raises:
        ValueError: there are fewer than two seeds, or a number is not finite.
    """
    import numpy as np

    seeds = _numbers(values)
    half = _t(confidence, len(seeds)) * seeds.std(ddof=1) * np.sqrt(1 + 1 / len(seeds))
    return float(seeds.mean() - half), float(seeds.mean() + half)


def same_seed(own: float, others: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Where a seed that is made again lies, if it is no farther off than two seeds are.

        own +- t(n - 1) * s * sqrt(2),    n and s of the other seeds

    Exact where rounding has made two runs of one seed as different as two seeds; the more they
    still share, the more often the second lies within.

    Args:
        own: the number of that seed.
        others: [S] those of S >= 2 other seeds.
        confidence: share of seeds made again that lie within, at least.

    Returns:
        Low and high end, in the unit of `others`.

    Raises:
        ValueError: there are fewer than two other seeds, or a number is not finite.
    """
    import numpy as np

    seeds = _numbers(others)
    half = _t(confidence, len(seeds)) * seeds.std(ddof=1) * np.sqrt(2)
    return float(own - half), float(own + half)


def _t(confidence: float, count: int) -> float:
    """Student's t of a two-sided interval from `count` seeds."""
    from scipy.stats import t

    if count < 2:
        raise ValueError(f"a spread needs at least two seeds, got {count}")
    return float(t.ppf((1 + confidence) / 2, count - 1))


def area_under_curve(x: Any, y: Any, *, above_start: bool = True) -> Floats:
    """Mean height of a curve: trapezoids, over the range of x.

    Args:
        x: [n] increasing, such as images drawn.
        y: [..., n] score at each x.
        above_start: whether each curve's first value is taken off, which leaves the mean gain.

    Returns:
        [...], in the unit of y.

    Raises:
        ValueError: fewer than two points, x does not increase, or a number is not finite.
    """
    import numpy as np

    at, height = _curve(x, y)
    if len(at) < 2:
        raise ValueError(f"area_under_curve needs n >= 2 points, got {at.shape} and {height.shape}")
    if above_start:
        height = height - height[..., :1]
    return np.asarray(np.trapezoid(height, at, axis=-1) / (at[-1] - at[0]))


def images_to_threshold(x: Any, y: Any, threshold: float, sign: int = 1) -> Floats:
    """The first x at which a curve reaches a threshold, such as images drawn to a size.

    Between evaluations the curve is a straight line. A mean over seeds must not leave out the
    seeds that never get there: they are the slow ones.

    Args:
        x: [n] increasing, such as images or pairs.
        y: [..., n] score at each x.
        threshold: in the unit of y.
        sign: an objective's: 1 where larger is better, -1 where smaller is.

    Returns:
        [...], in the unit of x; NaN for a curve that never gets there.

    Raises:
        ValueError: x does not increase, or a number is not finite.
    """
    import numpy as np

    at, height = _curve(x, y)
    return np.asarray(np.apply_along_axis(_crossing, -1, sign * (height - threshold), at))


def _crossing(height: Floats, at: Floats) -> float:
    """Where a curve [n] over `at` first reaches 0; NaN for nowhere."""
    import numpy as np

    there = np.flatnonzero(height >= 0)
    if len(there) == 0:
        return float("nan")
    i = int(there[0])
    if i == 0:
        return float(at[0])
    share = height[i - 1] / (height[i - 1] - height[i])
    return float(at[i - 1] + share * (at[i] - at[i - 1]))


def _curve(x: Any, y: Any) -> tuple[Floats, Floats]:
    """`x` [n] increasing and `y` [..., n], checked."""
    import numpy as np

    at, height = _numbers(x), _numbers(y)
    if at.ndim != 1 or height.shape[-1] != len(at) or bool((np.diff(at) <= 0).any()):
        raise ValueError(
            f"a curve needs increasing x [n] and y [..., n], got {at.shape} and {height.shape}, "
            f"x = {at}"
        )
    return at, height


def _tasks(values: Any) -> Floats:
    """[tasks, S], checked; of one task for [S]."""
    import numpy as np

    found = np.atleast_2d(_numbers(values))
    if found.ndim != 2:
        raise ValueError(f"iqm needs values [S] or [tasks, S], got {found.shape}")
    return found


def _numbers(values: Any) -> Floats:
    """Finite numbers: sorting would put a NaN last, and trimming then hide it."""
    import numpy as np

    found = np.asarray(values, dtype=np.float64)
    if found.ndim == 0 or found.size == 0:
        raise ValueError(f"expected numbers of at least one seed, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(
            f"expected finite numbers, got {int((~np.isfinite(found)).sum())} others in an array "
            f"of shape {found.shape}"
        )
    return found


def _trimmed(values: Floats) -> Floats:
    """Mean of the middle half of the last axis."""
    import numpy as np
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(values, 0.25, axis=-1))


def _wins(ours: Floats, theirs: Floats) -> Floats:
    """Share of pairs of [..., S] and [..., R] that ours win, ties half, [...]."""
    import numpy as np

    signs = np.sign(ours[..., :, None] - theirs[..., None, :])
    return np.asarray((signs.mean((-2, -1)) + 1) / 2)


def _resampled(seeds: Floats, rng: np.random.Generator) -> Floats:
    """Bootstrap resamples [RESAMPLES, S] of [S] sorted, so that their order changes nothing."""
    return seeds[rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))]


def _ends(drawn: Floats, confidence: float) -> tuple[float, float]:
    """The percentiles that hold the middle `confidence` of bootstrap values."""
    import numpy as np

    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
