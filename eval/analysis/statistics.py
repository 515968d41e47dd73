"""How sure a mean over seeds is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def interval(values: Any, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Student's t-interval of the mean over seeds: mean +- t(S - 1) * s / sqrt(S).

    It holds the true mean as often as it says where seeds are about normal, also with five of
    them, for which a percentile bootstrap is too narrow.

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

    seeds = np.asarray(values, dtype=np.float64)
    if seeds.ndim == 0 or len(seeds) == 0:
        raise ValueError(f"interval needs values [S, ...] of S >= 1 seeds, got {seeds.shape}")
    if len(seeds) == 1:
        nothing = np.full(seeds.shape[1:], np.nan)
        return nothing, nothing.copy()
    half = _t(confidence, len(seeds)) * seeds.std(0, ddof=1) / np.sqrt(len(seeds))
    return seeds.mean(0) - half, seeds.mean(0) + half


def between(middle: float, low: float, high: float) -> str:
    """A number with its interval, for tables; without one where its ends are NaN."""
    return f"{middle:+.3f}" + ("" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})")


class Difference(NamedTuple):
    """Of two means, with its interval and the p-value of "there is none"."""

    mean: float
    low: float
    high: float
    p: float
    error: float
    """Standard error, and its degrees of freedom, which further tests need."""
    freedom: float

    @staticmethod
    def unsure(mean: float) -> Difference:
        """One of which only the mean is known: a single seed says nothing about the spread."""
        return Difference(mean, *[math.nan] * 5)


def difference(ours: Any, theirs: Any, confidence: float = 0.95) -> Difference:
    """Difference of two methods' means over seeds, by Welch's t.

    Seeds are runs of their own, so the two methods' are independent even where their numbers are
    equal: what equal seeds share (prompts, first noise) makes the interval rather too wide than
    too narrow. It covers what other seeds would give on the same held-out images. It does not
    cover other prompts, nor how the settings of the two methods were chosen.

    Args:
        ours: [S] one number for each seed.
        theirs: [R].
        confidence: as in `interval`.

    Returns:
        Ours minus theirs, in their unit; ends and p are NaN where a method has one seed.

    Raises:
        ValueError: there is no seed, or a number is not finite.
    """
    import numpy as np

    a, b = _seeds(ours), _seeds(theirs)
    found = float(a.mean() - b.mean())
    if min(len(a), len(b)) == 1:
        return Difference.unsure(found)
    variances = np.array([part.var(ddof=1) / len(part) for part in (a, b)])
    both = variances.sum()
    # Welch and Satterthwaite's degrees of freedom
    freedom = both**2 / (variances**2 / (len(a) - 1, len(b) - 1)).sum() if both else 0.0
    return _by_student(found, float(np.sqrt(both)), float(freedom), confidence)


def paired_difference(ours: Any, theirs: Any, confidence: float = 0.95) -> Difference:
    """Mean difference of two methods over the same seeds, by Student's paired t.

    What a seed brings to both, prompts and first noise, cancels. As with `difference`, it covers
    what other seeds would give on the same held-out images, and nothing else.

    Args:
        ours: [S] one number for each seed.
        theirs: [S] of the same seeds, in the same order.
        confidence: as in `interval`.

    Returns:
        Ours minus theirs, in their unit; ends and p are NaN with one seed.

    Raises:
        ValueError: there is no seed, their numbers differ, or a number is not finite.
    """
    import numpy as np

    a, b = _seeds(ours), _seeds(theirs)
    if len(a) != len(b):
        raise ValueError(f"pairs need as many seeds of the one as of the other: {len(a)}, {len(b)}")
    apart = a - b
    found = float(apart.mean())
    if len(apart) == 1:
        return Difference.unsure(found)
    return _by_student(found, apart.std(ddof=1) / np.sqrt(len(apart)), len(apart) - 1, confidence)


def from_zero(values: Any, confidence: float = 0.95) -> Difference:
    """The mean of [S] numbers, one for each seed, tested against 0 by Student's t."""
    return paired_difference(values, [0.0] * len(values), confidence)


def over_both(values: Any) -> Difference:
    """The mean of numbers of seeds and pictures, tested against 0 as if both had been drawn.

    It covers what other seeds would give on other pictures. With the mean squares of seeds, of
    pictures and of what is left, its variance is (MS_s + MS_p - MS_left) / (S P), with
    Satterthwaite's degrees of freedom: an analysis of variance of two crossed random factors.

    Args:
        values: [S, P] of S seeds and P pictures, two of each at least.

    Returns:
        The mean, in their unit, with its 95 % interval and p-value.
    """
    import numpy as np

    found = finite_numbers(values)
    seeds, pictures = found.shape
    rows, columns, mean = found.mean(1, keepdims=True), found.mean(0), found.mean()
    degrees = np.array([seeds - 1, pictures - 1, (seeds - 1) * (pictures - 1)])
    squares = np.array([
        pictures * ((rows - mean) ** 2).sum(), seeds * ((columns - mean) ** 2).sum(),
        ((found - rows - columns + mean) ** 2).sum(),
    ]) / degrees  # fmt: skip
    # Chance can make what is left the largest: no less than what seeds or pictures give alone.
    both = max(squares[0] + squares[1] - squares[2], *squares[:2])
    freedom = both**2 / (squares**2 / degrees).sum() if both else 0.0
    return _by_student(float(mean), float(np.sqrt(both / found.size)), float(freedom), 0.95)


def by_seed(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Difference of two methods' means: paired where one has all seeds of the other, else Welch's.

    Further seeds of the one, which have no partner, do not count in a paired difference.

    Args:
        ours: seed -> number.
        theirs: likewise.
    """
    if shared := paired_seeds(ours, theirs):
        return paired_difference([ours[seed] for seed in shared], [theirs[seed] for seed in shared])
    return difference([*ours.values()], [*theirs.values()])


def paired_seeds(ours: Iterable[int], theirs: Iterable[int]) -> list[int]:
    """The seeds that both have, where one has all seeds of the other; else none are paired."""
    ours, theirs = set(ours), set(theirs)
    shared = ours & theirs
    return sorted(shared) if shared in (ours, theirs) else []


def _by_student(found: float, error: float, freedom: float, confidence: float) -> Difference:
    """A difference by its standard error and degrees of freedom.

    What all seeds share, as untrained runs do, has no error: it is there, or there is none.
    scipy's own tests say NaN there, and warn where seeds are nearly equal.
    """
    from scipy.stats import t

    if error == 0:
        return Difference(found, found, found, float(found == 0), 0.0, freedom)
    half = float(t.ppf((1 + confidence) / 2, freedom) * error)
    p = float(2 * t.sf(abs(found) / error, freedom))
    return Difference(found, found - half, found + half, p, error, freedom)


def equivalence(found: Difference, margin: float) -> float:
    """P-value of "the means are at least `margin` apart": two one-sided t-tests.

    Schuirmann 1987 (J. Pharmacokinetics and Biopharmaceutics 15, 657-680). Below 0.05 it shows
    that two methods are equivalent, which a large p-value of a difference does not. The margin has
    to be chosen before the runs.

    Args:
        found: the difference.
        margin: above 0, in its unit.

    Returns:
        The larger p of the two; NaN where a method has one seed.
    """
    from scipy.stats import t

    inside = margin - abs(found.mean)
    if found.error == 0:
        return float(inside <= 0)
    return float(t.sf(inside / found.error, found.freedom))


def smallest_shown(found: Difference, tests: int = 1, power: float = 0.8) -> float:
    """The smallest true difference that as many seeds would show, if they spread as these do.

    By the noncentral t distribution, as in Cohen's tables (Statistical Power Analysis, 1988), at
    5 % over the number of tests: what Holm asks of the first of them.

    Args:
        found: a difference, of which only the standard error and its freedom count.
        tests: two-sided ones that are adjusted together.
        power: share of such experiments that would show it.

    Returns:
        Above 0, in the unit of the difference; NaN where a method has one seed.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    if not found.error > 0:
        return found.error
    edge = t.ppf(1 - 0.05 / tests / 2, found.freedom)
    # The other side's share is left out as tables do: at this power it is below 1e-4.
    far = 10 * edge + 10  # of two seeds, twenty tests ask for 300 standard errors
    return float(found.error * brentq(lambda d: nct.sf(edge, found.freedom, d) - power, 0, far))


def holm(values: Sequence[float]) -> list[float]:
    """P-values adjusted for being several (Holm 1979); NaN stays, and counts as no test.

    Calling those below 0.05 differences makes a single false one in at most 5 % of tables.

    Args:
        values: p-values, 0 to 1 or NaN.

    Returns:
        In the same order.
    """
    tests = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=values.__getitem__)
    found, largest = list(values), 0.0
    for place, i in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - place) * values[i]))
        found[i] = largest
    return found


def probability_of_improvement(
    ours: Any, theirs: Any, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Probability that a seed of one method ends above a seed of another, with its interval.

    Mann and Whitney's U over the number of pairs; a tie counts as half. The interval is Newcombe's
    method 5 (Statistics in Medicine 25, 2006, 559-573), a score interval: it does not shrink to a
    point where the seeds do not overlap.

    Args:
        ours: [S] one number for each seed; negate both where smaller is better.
        theirs: [R].
        confidence: as in `interval`.

    Returns:
        Probability, low and high end, 0 to 1; the ends are NaN where a method has one seed.

    Raises:
        ValueError: there is no seed, or a number is not finite.
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import norm

    a, b = _seeds(ours), _seeds(theirs)
    found = float((np.sign(a[:, None] - b[None]).mean() + 1) / 2)
    if min(len(a), len(b)) == 1:
        return found, math.nan, math.nan
    z, others = norm.ppf((1 + confidence) / 2), (len(a) + len(b)) / 2 - 1

    def excess(p: float) -> float:
        """How much farther p is from what was found than z standard errors at p."""
        inner = 1 + others * ((1 - p) / (2 - p) + p / (1 + p))
        return float((found - p) ** 2 - z**2 * p * (1 - p) * inner / (len(a) * len(b)))

    just = 1e-9  # beside `found`, as `excess` is 0 at 0 and at 1, too
    low = 0.0 if found == 0 else brentq(excess, 0, found - just)
    high = 1.0 if found == 1 else brentq(excess, found + just, 1)
    return found, float(low), float(high)


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

    seeds = finite_numbers(values)
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

    seeds = finite_numbers(others)
    half = _t(confidence, len(seeds)) * seeds.std(ddof=1) * np.sqrt(2)
    return float(own - half), float(own + half)


def _t(confidence: float, count: int) -> float:
    """Student's t of a two-sided interval from `count` seeds."""
    from scipy.stats import t

    if count < 2:
        raise ValueError(f"a spread needs at least two seeds, got {count}")
    return float(t.ppf((1 + confidence) / 2, count - 1))


def _seeds(values: Any) -> Floats:
    """[S], checked."""
    found = finite_numbers(values)
    if found.ndim != 1:
        raise ValueError(f"expected one number for each seed, got shape {found.shape}")
    return found


def finite_numbers(values: Any) -> Floats:
    """Numbers of at least one seed, in any shape.

    Raises:
        ValueError: there is none, or one is not finite: sorting would put it last, out of sight.
    """
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
