"""Curves as SVG for the report page: where on a panel everything is, and what a point says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.figures.style import Looks

if TYPE_CHECKING:
    from eval.analysis.runs import Frame

WIDTH = 420
LEFT, RIGHT, TOP, BELOW = 52, 12, 10, 24
"""Margins, for the numbers at the ticks."""

TICK_EVERY = 45
"""Pixels between ticks, about."""


@dataclass(frozen=True)
class Scale:
    """Values of an axis, in pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[tuple[float, str]]
    """Place and number."""

    def __call__(self, value: float) -> float:
        """Where a value is; a tenth of a pixel is enough."""
        return round(_place(value, self.low, self.high, self.start, self.end), 1)


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / (high - low) * (end - start)


def scale(values: Iterable[float], start: float, end: float, *, whole: bool = False) -> Scale:
    """An axis that holds the finite ones of `values`, with a margin and round ticks.

    Args:
        values: to be shown.
        start: where the axis begins, in pixels.
        end: where it ends.
        whole: whether they are counts, between which there is nothing.
    """
    from matplotlib.ticker import MaxNLocator

    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    flat = high - low < 1e-6 * abs(high)  # but for rounding
    margin = (0.05 if flat else 0.03) * ((high if flat else high - low) or 1.0)
    low, high = low - abs(margin), high + abs(margin)
    most = max(2, int(abs(end - start) / TICK_EVERY))
    locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole)
    found = [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
    digits = max((len(f"{tick:.6g}".partition(".")[2]) for tick in found), default=0)
    ticks = [(round(_place(t, low, high, start, end), 1), f"{t:,.{digits}f}") for t in found]
    return Scale(low, high, start, end, ticks)


@dataclass(frozen=True)
class Point:
    """A mean over seeds."""

    x: float
    y: float
    cells: tuple[str, str, str, str]
    """Where it is across, the mean, its interval and the number of seeds, in words."""


@dataclass(frozen=True)
class Line:
    """A method's course."""

    method: str
    marker: str
    points: Sequence[Point]
    band: str
    """Corners of the interval, as SVG's polygon wants them; "" without one."""

    @property
    def path(self) -> str:
        """As SVG's polyline wants it."""
        return " ".join(f"{point.x},{point.y}" for point in self.points)


@dataclass(frozen=True)
class Panel:
    """What is drawn, in pixels."""

    height: int
    x: Scale
    y: Scale
    base: float | None
    """Where the base model's line is."""
    lines: Sequence[Line]


def panel(
    means: Frame,
    looks: Looks,
    forms: Mapping[str, str],
    *,
    height: int,
    base: float | None = None,
) -> Panel:
    """Lay out the means of an objective, as `averages` returns them.

    Args:
        means: columns method, x, mean, low, high and seeds; NaN ends for no interval.
        looks: of the methods.
        forms: how x and y are written, such as {"x": ",.0f", "y": ".3f"}.
        height: in pixels, of a panel that is WIDTH wide.
        base: the base model's mean, if it has a line.
    """
    across = scale(means["x"], LEFT, WIDTH - RIGHT, whole=forms["x"].endswith("0f"))
    ends = [value for name in ("mean", "low", "high") for value in means[name]]
    up = scale([*ends, *([] if base is None else [base])], height - BELOW, TOP)
    lines = [
        Line(method, marker, _points(rows, across, up, forms), _band(rows, across, up))
        for method, (_, marker) in looks.items()
        if len(rows := means[means["method"] == method])
    ]
    return Panel(height, across, up, None if base is None else up(base), lines)


def _points(rows: Frame, x: Scale, y: Scale, forms: Mapping[str, str]) -> list[Point]:
    found = []
    for row in rows.itertuples():
        low, high = format(row.low, forms["y"]), format(row.high, forms["y"])
        spread = "" if math.isnan(row.low) else f"{low} to {high}"
        cells = (format(row.x, forms["x"]), format(row.mean, forms["y"]), spread, str(row.seeds))
        found.append(Point(x(row.x), y(row.mean), cells))
    return found


def _band(rows: Frame, x: Scale, y: Scale) -> str:
    if rows["low"].isna().any():
        return ""
    there = [(x(row.x), y(row.low)) for row in rows.itertuples()]
    back = [(x(row.x), y(row.high)) for row in rows[::-1].itertuples()]
    return " ".join(f"{a},{b}" for a, b in [*there, *back])


def marker_shape(marker: str, size: float) -> str:
    """The corners of matplotlib's marker, as SVG's polygon wants them.

    Args:
        marker: as in `LOOKS`.
        size: across, in pixels.
    """
    import numpy as np
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(marker)
    shape = style.get_path().transformed(style.get_transform())
    corners = np.array(shape.to_polygons()[0])[:-1] * (size, -size)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
