"""Curves over what was spent: their mean height, and where they get to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eval.analysis.statistics import finite_numbers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


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

    at, height = finite_numbers(x), finite_numbers(y)
    if at.ndim != 1 or height.shape[-1] != len(at) or bool((np.diff(at) <= 0).any()):
        raise ValueError(
            f"a curve needs increasing x [n] and y [..., n], got {at.shape} and {height.shape}, "
            f"x = {at}"
        )
    return at, height
