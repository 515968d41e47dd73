"""The methods at equal budgets, and how surely one beats another: the tables of docs/comparison.md.

    python results/efficiency.py results/tiny

A table for each objective. "After" so many pairs, images or UNet passes is where the method that
spends least of them ends; a curve is a straight line between its evaluations. Gains keep the
score's own sign, so where smaller is better a negative one is good. Everything is of held-out
images and the training sampler, with 95 % intervals over seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench import registry
from d3po_bench.errors import said_in_one_line
from eval.analysis.runs import Run, curves, read_groups
from eval.analysis.statistics import (
    area_under_curve,
    images_to_threshold,
    mean_told,
    probability_of_improvement,
)

BUDGETS = {"pairs": "pairs or single images", "images": "images", "unet_forwards": "UNet passes"}
"""What methods are compared at, and what to call it."""

RIVAL = "d3po"
"""The method that the others are compared with."""

AGAINST = (f"images to half of {RIVAL}'s gain", f"probability to end better than {RIVAL}")

Methods = dict[str, list[Run]]
"""Of one objective: method -> its runs."""


def paths(runs: list[Run], x: str) -> list[tuple[Any, Any]]:
    """What each seed had spent [n], and its held-out score there [n]."""
    seeds = curves(runs, x).groupby("seed")
    return [(seed["x"].to_numpy(), seed["score"].to_numpy()) for _, seed in seeds]


def least(methods: Methods, x: str) -> float:
    """The most of a budget that every run has spent."""
    return float(min(at[-1] for runs in methods.values() for at, _ in paths(runs, x)))


def gains(runs: list[Run], x: str, budget: float) -> Any:
    """Gain of each seed [S] when it had spent that much."""
    return np.array([np.interp(budget, at, score) - score[0] for at, score in paths(runs, x)])


def ends(runs: list[Run]) -> Any:
    """Gain of each seed [S] at its last evaluation."""
    return gains(runs, "images", np.inf)


def speed(runs: list[Run], methods: Methods, sign: int) -> str:
    """Images until half of the rival's gain; how many seeds get there, where not all do."""
    if RIVAL not in methods:
        return ""
    half = ends(methods[RIVAL]).mean() / 2
    drawn = [
        float(images_to_threshold(at, score - score[0], half, sign))
        for at, score in paths(runs, "images")
    ]
    there = np.isfinite(drawn)
    return f"{np.mean(drawn):,.0f}" if there.all() else f"{there.sum()} of {len(drawn)} seeds"


def course(runs: list[Run], column: str) -> Any:
    """Mean over seeds of a column at each evaluation, training sampler; NaN where not known."""
    seeds = [run.scores.loc["eta1"].get(column) for run in runs]
    return np.mean([np.nan if seed is None else seed.to_numpy() for seed in seeds], axis=0)


def least_end(methods: Methods, sign: int) -> float:
    """The smallest mean gain at the end, of methods that reach half of the rival's."""
    scores = {method: course(runs, "score") for method, runs in methods.items()}
    found = {method: sign * float(mean[-1] - mean[0]) for method, mean in scores.items()}
    return sign * min(gain for gain in found.values() if gain >= found.get(RIVAL, -np.inf) / 2)


def drift(runs: list[Run], gain: float, sign: int) -> str:
    """KL to the base model where the mean gain is that; nothing where it never is."""
    scores, kl = course(runs, "score"), course(runs, "kl")
    if np.isnan(kl).any():
        return ""
    places = np.arange(len(scores), dtype=float)
    there = float(images_to_threshold(places, scores - scores[0], gain, sign))
    return "" if np.isnan(there) else f"{np.interp(there, places, kl):.3f}"


def chance(runs: list[Run], methods: Methods, sign: int) -> str:
    """How probably a seed ends better than one of the rival."""
    if RIVAL not in methods or runs is methods[RIVAL]:
        return ""
    found, low, high = probability_of_improvement(sign * ends(runs), sign * ends(methods[RIVAL]))
    return f"{found:.2f}" + ("" if np.isnan(low) else f" ({low:.2f} to {high:.2f})")


def row(method: str, methods: Methods, budgets: dict[str, float], level: float, sign: int) -> str:
    """One line of an objective's table."""
    runs = methods[method]
    area = np.array([area_under_curve(at, score) for at, score in paths(runs, "images")])
    cells = [mean_told(gains(runs, x, budget)) for x, budget in budgets.items()]
    cells += [mean_told(area), drift(runs, level, sign)]
    cells += [speed(runs, methods, sign), chance(runs, methods, sign)]
    return f"| {' | '.join([method, *cells])} |"


def table(objective: str, methods: Methods) -> str:
    """The methods on one objective, under its name."""
    budgets = {x: least(methods, x) for x in BUDGETS}
    after = [f"gain after {budget:,.0f} {BUDGETS[x]}" for x, budget in budgets.items()]
    sign = registry.objective(objective).sign
    level = least_end(methods, sign)
    equal = f"KL at a mean gain of {level:+.3f}"
    names = ["method", *after, "mean gain over the images drawn", equal, *AGAINST]
    rows = [row(method, methods, budgets, level, sign) for method in methods]
    head = [f"| {' | '.join(names)} |", "|---" + "|--:" * (len(names) - 1) + "|"]
    return "\n".join([f"`{objective}`:", "", *head, *rows])


def tables(folders: list[Path]) -> str:
    """A table for each objective of the runs below `folders`.

    Raises:
        UserError: the runs cannot be read or do not belong together, or one has no count of what
            is compared.
    """
    objectives: dict[str, Methods] = {}
    for (_, objective, method), runs in read_groups(folders).items():
        objectives.setdefault(objective, {})[method] = runs
    return "\n\n".join(table(objective, methods) for objective, methods in objectives.items())


if __name__ == "__main__":
    with said_in_one_line():
        print(tables([Path(argument) for argument in sys.argv[1:]]))
