"""Two sets of runs side by side: the gain of every seed, and their difference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from d3po_bench.errors import UserError
from d3po_bench.runs.files import write_atomically
from eval.analysis.compare import Comparison
from eval.figures.style import MUTED, fit, looks_of, own_style, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg")

WIDTH, BETWEEN = 6.4, 1.3
"""Inches of a figure, and from one side's name to the other's."""


def require_kind(path: Path) -> None:
    """Refuse a name that says no kind of picture.

    Raises:
        UserError: it ends in another way than those in `KINDS`.
    """
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path} is no .png or .svg. Give --plot a name that ends so.")


def draw(found: Comparison, path: Path) -> None:
    """Write the figure to a file that ends in .png or .svg."""
    with own_style():
        write_atomically(path, rendered(comparison_figure(found), path.suffix.lower()[1:]))


def comparison_figure(found: Comparison) -> Figure:
    """Left the seeds of both sides with their means and intervals, right the difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    _draw_sides(left, found)
    _draw_interval(right, 0, tuple(found.difference[:3]), MUTED)
    unit = found.score.unit
    for axes, what in ((left, "gain"), (right, "difference")):
        axes.axhline(0, color=MUTED, linestyle=":", linewidth=1.2)
        axes.set_ylabel(f"{what} ({unit})" if unit else what)
        axes.grid(visible=False, axis="x")
    right.set(xticks=[0], xticklabels=["left - right\n(95 % interval)"], xlim=(-1, 1))
    fit(figure.suptitle(_title(found), fontweight="bold"), WIDTH - 0.3)
    return figure


def _title(found: Comparison) -> str:
    shown = f"{found.ours.name} is {found.verdict}"
    if found.verdict == "not shown":
        shown = "no difference shown"
    return f"{shown} on {found.objective} ({found.score.better})"


def _draw_sides(axes: Axes, found: Comparison) -> None:
    sides = (found.ours, found.theirs)
    looks = looks_of(side.name for side in sides)
    if found.paired:
        pairs = np.array([[side.gains[seed] for seed in found.paired] for side in sides])
        axes.plot([0, 1], pairs, color=MUTED, alpha=0.35)
    for place, side in enumerate(sides):
        colour, marker = looks[side.name]
        gains, record = [*side.gains.values()], side.record
        axes.plot([place] * len(gains), gains, marker, color=colour, alpha=0.6, markersize=4.5)
        ends = (record["gain"], record["low"], record["high"])
        _draw_interval(axes, place + (-0.15, 0.15)[place], ends, colour)
    axes.set_xticks([0, 1], [side.name for side in sides])
    axes.set_xticklabels([fit(label, BETWEEN) for label in axes.get_xticklabels()])
    axes.set_xlim(-0.6, 1.6)


def _draw_interval(axes: Axes, place: float, ends: tuple[float, ...], colour: str) -> None:
    """A mean with its interval, if it has one."""
    mean, low, high = ends
    axes.errorbar(
        [place], [mean], [[mean - low], [high - mean]], color=colour, fmt="_", markersize=12,
        capsize=4, linewidth=2,
    )  # fmt: skip
