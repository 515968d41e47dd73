"""How often our intervals hold what they should, on made-up seeds whose truth is known.

`python results/measure.py coverage` draws them and writes coverage.csv, in two minutes; `table`
shows that file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from eval.analysis.statistics import (
    difference,
    interval,
    paired_difference,
    probability_of_improvement,
)
from eval.analysis.tables import Record, Table, text

FILE = Path(__file__).parent / "coverage.csv"
REPEATS = 10_000
"""The standard error of a share of 95 % is then 0.2 %."""
SEEDS = (5, 20)
SHIFT = 1.0
"""What separates two methods, in standard deviations of a method's seeds."""

Draw = Callable[[Any, tuple[int, ...]], Any]
"""Numbers of that shape with mean 0 and standard deviation 1."""

DRAWS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
}
"""Skewed: exponential, as a few seeds that gain far more than the others."""

BETTER = {"normal": float(norm.cdf(SHIFT / math.sqrt(2))), "skewed": 1 - math.exp(-SHIFT) / 2}
"""The true probability that a seed with `SHIFT` is above one without."""


def measure() -> None:
    """Write coverage.csv."""
    rows = [
        {"interval": name, "seeds": count, **{data: f"{share:.4f}" for data, share in found}}
        for name, holds in INTERVALS.items()
        for count in SEEDS
        for found in [[(data, _share(holds, data, count)) for data in DRAWS]]
    ]
    write_atomically(FILE, csv_bytes(rows))


def _share(holds: Callable[[str, Any, int], Iterator[bool]], data: str, count: int) -> float:
    return float(np.mean(list(holds(data, np.random.default_rng(20231122), count))))


def _mean(data: str, rng: Any, count: int) -> Iterator[bool]:
    low, high = interval(DRAWS[data](rng, (count, REPEATS)))
    yield from (low <= 0) & (high >= 0)


def _welch(data: str, rng: Any, count: int) -> Iterator[bool]:
    """Of two methods, one of which spreads twice as much."""
    for ours, theirs in zip(*(DRAWS[data](rng, (REPEATS, count)) for _ in "ab"), strict=True):
        found = difference(SHIFT + ours, 2 * theirs)
        yield found.low <= SHIFT <= found.high


def _paired(data: str, rng: Any, count: int) -> Iterator[bool]:
    """Of two methods with as much in common as of their own, one of which may be skewed."""
    common, theirs = (rng.normal(size=(REPEATS, count)) for _ in "ab")
    for seed, a, b in zip(common, DRAWS[data](rng, (REPEATS, count)), theirs, strict=True):
        found = paired_difference(seed + SHIFT + a, seed + b / 4)
        yield found.low <= SHIFT <= found.high


def _better(data: str, rng: Any, count: int) -> Iterator[bool]:
    for ours, theirs in zip(*(DRAWS[data](rng, (REPEATS, count)) for _ in "ab"), strict=True):
        _, low, high = probability_of_improvement(SHIFT + ours, theirs)
        yield low <= BETTER[data] <= high


INTERVALS: dict[str, Callable[[str, Any, int], Iterator[bool]]] = {
    "mean over seeds (Student)": _mean,
    "difference of two methods (Welch)": _welch,
    "difference seed by seed (paired)": _paired,
    "probability of improvement (Newcombe)": _better,
}


def table() -> Table:
    """What `measure` found: a row for each interval and number of seeds."""
    columns = {
        "95 % interval of the": text("interval"), "seeds": text("seeds"),
        **{f"holds the truth, {data} seeds": _percent(data) for data in DRAWS},
    }  # fmt: skip
    return Table(read_csv(FILE), columns, left=("95 % interval of the",))


def _percent(field: str) -> Callable[[Record], str]:
    return lambda record: f"{float(record[field]):.1%}"
