"""What each method gained over the base model, as the Markdown table of the README.

    python results/summary.py results/tiny/quick

A row for each model, objective and method: the held-out score (training sampler) of the base
model and at the end, the mean gain over seeds with its 95 % interval, the gain as a share of
the base model's distance from the size of a flat image, how recognisable samples are before
and after, and seconds of a seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from d3po_bench import registry
from eval.report import Run, find_runs, read_run
from eval.statistics import interval

HEAD = (
    "| objective | method | seeds | base | end | gain (95 % interval) | worst seed | "
    "share of excess | recognised | seconds a seed |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def flat_size(side: int) -> float:
    """JPEG size of a flat grey image of that many pixels a side, kB."""
    image = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    return float(registry.scorer("jpeg_size", torch.device("cpu"))(image, [""])[0])


def ends(run: Run, column: str = "score") -> tuple[float, float]:
    """Mean of a column of the first and last evaluation, training sampler."""
    values = run.scores.loc["eta1"][column]
    return float(values.iloc[0]), float(values.iloc[-1])


def row(group: tuple[str, str, str], runs: list[Run]) -> str:
    """One line of the table."""
    base = np.array([ends(run)[0] for run in runs])
    end = np.array([ends(run)[1] for run in runs])
    gain = end - base
    low, high = interval(gain)
    share = gain.mean() / (base.mean() - flat_size(32))
    known = [np.mean([ends(run, "animal")[i] for run in runs]) for i in (0, 1)]
    worst = gain.min() if gain.mean() > 0 else gain.max()
    seconds = np.mean([max(s["seconds"] for s in run.spent.values()) for run in runs])
    return (
        f"| {group[1]} | {group[2]} | {len(runs)} | {base.mean():.3f} | {end.mean():.3f} | "
        f"{gain.mean():+.3f} ({low:+.3f} to {high:+.3f}) | {worst:+.3f} | {share:+.0%} | "
        f"{known[0]:.2f} -> {known[1]:.2f} | {seconds:.0f} |"
    )


def table(folders: list[Path]) -> str:
    """The whole table of the runs below `folders`."""
    runs = sorted(map(read_run, find_runs(folders)), key=lambda run: (run.group, run.seed))
    groups = sorted({run.group for run in runs})
    return "\n".join([HEAD, *(row(g, [r for r in runs if r.group == g]) for g in groups)])


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]))
