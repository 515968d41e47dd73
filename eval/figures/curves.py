"""Learning curves in the manner of Figure 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.analysis.runs import DRIFTS, averages, curves, read_groups
from eval.analysis.scores import Score, scores_of
from eval.figures.sheets import samples_sheet, sheet_name
from eval.figures.style import (
    MUTED,
    Looks,
    fit,
    looks_of,
    own_style,
    rendered,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eval.analysis.runs import Frame, Group, Run


X_LABELS = {
    "rounds": "sampling rounds (the paper's epochs)",
    "pairs": "training pairs (images, for methods that learn from single ones)",
    "images": "training images generated",
    "scorer_calls": "images scored in training",
    "unet_forwards": "forward passes of the UNet in training (a guided step is two)",
    "unet_backwards": "backward passes of the UNet in training",
    "seconds": "training time without evaluation (s)",
    "cpu": "processor time of training, all threads (s)",
    "drift": "drift: change of the network's prediction at fixed latents (variance of the noise)",
    "kl_trained": "KL to the base model, mean over the steps trained on (nats per element)",
    "kl": "KL to the base model, mean over all steps (nats per element)",
}
"""What curves are drawn over: what was spent, or how far the model has moved, which makes a front
of reward, drift and, in the panels below, recognisability."""


BESIDE_TITLES = 0.85
"""Inches of a panel's width that its title leaves free, for it stands in the middle of the axes."""


SEEDS_SHOWN = 3
"""Most methods in a panel that still shows the curve of every seed."""


def plot(
    runs: Sequence[Path], out: Path | None = None, x: str = "pairs", *, unfinished: bool = False
) -> list[Path]:
    """Draw every run below `runs`.

    Args:
        runs: run folders, or folders of them at any depth.
        out: folder for the figures; `plots` in the first of `runs` if None.
        x: what the curves are drawn over; a key of `X_LABELS`.
        unfinished: draw runs that have not ended, too: a mean goes as far as all its seeds have.

    Returns:
        The files written: curves.png, curves.svg, and a samples-MODEL-OBJECTIVE-METHOD.png for
        each group of runs that has sample images.

    Raises:
        ValueError: `x` is none of `X_LABELS`.
        UserError: no run is found, one cannot be read, was cut short or has no evaluation, base
            models are mixed, seeds of a method do not belong together, or `out` cannot be
            written.
        RunError: the disk is full.
    """
    if x not in X_LABELS:
        raise ValueError(f"x must be one of {', '.join(X_LABELS)}, got {x!r}")
    groups = read_groups(runs, unfinished=unfinished)
    out = out or runs[0] / "plots"
    files = draw_curves(groups, x, out)
    for group, members in groups.items():
        sheet = samples_sheet(members)
        if sheet is not None:
            files.append(_write(out / sheet_name(group), sheet))
    return files


def draw_curves(groups: Mapping[Group, Sequence[Run]], x: str, out: Path) -> list[Path]:
    """Write curves.png and curves.svg of runs that were read.

    Args:
        groups: of one base model.
        x: a key of `X_LABELS`.
        out: folder for the figures.

    Raises:
        UserError: a run does not know `x`, or `out` cannot be written.
    """
    every = [run for members in groups.values() for run in members]
    with own_style():
        figure = curves_figure(curves(every, x), x, scores_of(run.files for run in every))
        return [_write(out / f"curves.{kind}", rendered(figure, kind)) for kind in ("png", "svg")]


def _write(path: Path, data: bytes) -> Path:
    from d3po_bench.runs.files import write_atomically

    write_atomically(path, data)
    return path


def curves_figure(table: Frame, x: str, scores: Mapping[str, Score]) -> Figure:
    """A panel for each objective, over what `curves` returns for the runs of one base model.

    `scores` says what the scores of each objective mean.

    With the scores of the scorer `animal`, a smaller panel under each: a method that pleases
    the objective with pictures nobody can name falls there.
    """
    from matplotlib.figure import Figure

    objectives = sorted(table["objective"].unique())
    heights = [3.0, 1.3] if table["animal"].notna().any() else [3.2]
    # 8.5 inches fill a README's 850 pixels, where 10 points are then 14 pixels.
    width = 6.4 if len(objectives) == 1 else max(8.5, 2.9 * len(objectives))
    looks = looks_of(table["method"].unique())
    figure = Figure(figsize=(width, sum(heights) + 1.1), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(objectives), height_ratios=heights)
    for column, objective in enumerate(objectives):
        part = table[table["objective"] == objective]
        axes = figure.add_subplot(grid[0, column])
        better, unit = scores[objective].better, scores[objective].unit
        words = f"{objective} ({better})" if better else objective
        title = axes.set_title(words, fontweight="bold")
        fit(title, width / len(objectives) - BESIDE_TITLES)
        axes.set_ylabel(f"held-out score ({unit})" if unit else "held-out score")
        _draw_panel(axes, part, "score", looks)
        if x in DRIFTS:  # a square of how far weights have moved: its root spreads the beginning
            import numpy as np

            axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
            axes.set_xlim(left=0)
            axes.set_xticks(root_ticks(axes.get_xlim()[1]))
        if len(heights) > 1:
            below = figure.add_subplot(grid[1, column], sharex=axes)
            _draw_panel(below, part, "animal", looks)
            _finish_recognised(below, axes)
    figure.supxlabel(X_LABELS[x], fontsize=10)
    _draw_legend(figure, table, looks)
    return figure


def root_ticks(most: float) -> list[float]:
    """0 and round numbers up to `most`, a quarter of an axis of square roots apart or more."""
    found = [0.0]
    if most > 0:
        first = math.floor(math.log10(most)) - 2
        for value in (digit * 10.0**k for k in range(first, first + 3) for digit in (1, 2, 5)):
            if value <= most and math.sqrt(value) - math.sqrt(found[-1]) >= math.sqrt(most) / 4:
                found.append(value)
    return found


def _draw_panel(axes: Axes, part: Frame, column: str, looks: Looks) -> None:
    """Seeds, means, intervals and the base model's line, of one objective."""
    base = part.loc[part["round"] == 0, column].mean()
    axes.axhline(base, color=MUTED, linestyle=":", linewidth=1.2)
    # Single seeds of many methods hide the bands that sum them up.
    seeds = part if part["method"].nunique() <= SEEDS_SHOWN else part[:0]
    for (method, _), rows in seeds.groupby(["method", "seed"]):
        axes.plot(rows["x"], rows[column], color=looks[method][0], alpha=0.25, linewidth=0.7)
    for method, rows in averages(part, column).groupby("method"):
        colour, marker = looks[method]
        axes.fill_between(
            rows["x"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(
            rows["x"], rows["mean"], color=colour, linewidth=2, marker=marker, markersize=4.5,
            markeredgecolor="white", markeredgewidth=0.6, markevery=max(1, len(rows) // 10),
        )  # fmt: skip
    axes.margins(x=0.02)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _finish_recognised(axes: Axes, above: Axes) -> None:
    """The axes of the panel under a panel, which holds probabilities."""
    low = 0.0 if axes.dataLim.y0 < 0.5 else 0.5
    axes.set_ylim(low - 0.04 * (1 - low), 1 + 0.04 * (1 - low))
    axes.set_yticks([low, (1 + low) / 2, 1])
    axes.set_ylabel("recognised\n(probability)")
    above.tick_params(axis="x", labelbottom=False)


def _draw_legend(figure: Figure, table: Frame, looks: Looks) -> None:
    """Methods with their numbers of seeds, the base model's line and the band."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, label=seeds_label(table, method))
        for method, (colour, marker) in looks.items()
    ]
    handles.append(Line2D([], [], color=MUTED, linestyle=":", label="base model"))
    if table.groupby(["model", "objective", "method"])["seed"].nunique().max() > 1:
        handles.append(
            Patch(color=MUTED, alpha=0.25, linewidth=0, label="95 % interval over seeds")
        )
    for widest in range(4, 0, -1):
        # Full rows: six in two rows of three, seven in four and three.
        columns = -(-len(handles) // -(-len(handles) // widest))
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def seeds_label(table: Frame, method: str) -> str:
    """A method with its number of seeds, or the range of it over the panels."""
    rows = table[table["method"] == method]
    counts = rows.groupby(["model", "objective"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    number = str(low) if low == high else f"{low}-{high}"
    return f"{method} ({number} {'seed' if high == 1 else 'seeds'})"
