"""Settings for what simulated raters say, tried on development seeds as PROTOCOL.md asks.

    python -m results.tries runs/feedback-tries

plays Figures 4 and 5 on version 2 with each try, resumes where it was interrupted, and writes
tiny2/feedback/tries.csv, from which `chosen` takes the settings of the published rounds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from d3po_bench.errors import said_in_one_line
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from eval.analysis.tables import Record, Table, number, text
from results.feedback import QUESTIONS, asked, learned_of, path_of

HOME = "tiny2"
SEEDS = (100, 101)
RATES = {"4": ("0.0005", "0.001", "0.002", "0.004"), "16": ("0.00025", "0.0005", "0.001", "0.002")}
"""Optimizer steps on the tags of a round -> learning rates."""

TRIES = [
    {"prompts_per_round": "45", "updates_per_round": updates, "learning_rate": rate}
    for updates, rates in RATES.items()
    for rate in rates
]
"""The same for both experiments."""

KEPT = 0.7
"""Least share of the first round's recognised pictures, in every seed."""


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", default="cpu", show_default=True)
def measure(out: Path, device: str) -> None:
    """Play all tries below OUT, and write tries.csv."""
    from results.raters import rounds

    for options in commands(out):
        rounds.main([*options, "--device", device], standalone_mode=False)
    collect(out)


def commands(out: Path) -> Iterator[list[str]]:
    """What `measure.py rounds` is given for each experiment, try and seed."""
    for name, (index, settings), seed in product(QUESTIONS[HOME], enumerate(TRIES), SEEDS):
        learn = [part for pair in settings.items() for part in ("--set", "=".join(pair))]
        yield [name, "--seed", str(seed), *learn, "--out", str(out / f"try-{index}")]


def collect(out: Path) -> None:
    """Write tries.csv of what was played below `out`, and where and when it was."""
    rows = [
        {"experiment": name, "try": index, "seed": seed} | row
        for name, index, seed in product(QUESTIONS[HOME], range(len(TRIES)), SEEDS)
        for row in read_csv(out / f"try-{index}" / name / "error-0" / f"seed-{seed}" / "rates.csv")
    ]
    write_atomically(path_of(HOME, "tries"), csv_bytes(rows))
    write_atomically(path_of(HOME, "tries-learned"), csv_bytes([*learned_of(out)]))


def chosen(experiment: str) -> Mapping[str, str]:
    """The settings of the try with the largest rise among those that keep the animals.

    If no try keeps them, those of the try that keeps the most.
    """
    ends = [record for record in _records() if record["experiment"] == experiment]
    keeping = [record for record in ends if record["kept"] >= KEPT]
    best = max(keeping or ends, key=lambda r: r["rise" if keeping else "kept"])
    return TRIES[best["try"]]


def _records() -> Iterator[Record]:
    """For each try the mean rise of the rate, and the worse seed's share of recognised pictures."""
    found: dict[tuple[str, int], dict[str, list[Any]]] = {}
    for row in read_csv(path_of(HOME, "tries")):
        seeds = found.setdefault((row["experiment"], int(row["try"])), {})
        seeds.setdefault(row["seed"], []).append(row)
    for (experiment, index), seeds in found.items():
        ends = [(rows[0], rows[-1]) for rows in seeds.values()]
        drawn = [float(last["base"]) for _, last in ends if last.get("base")]
        yield {
            "experiment": experiment, "try": index, "seeds": len(ends),
            "rise": fmean(float(last["good"]) - float(first["good"]) for first, last in ends),
            "paired": fmean(float(last["good"]) for _, last in ends) - fmean(drawn)
            if drawn else math.nan,
            "kept": min(float(last["recognised"]) / float(first["recognised"])
                        for first, last in ends),
        }  # fmt: skip


def table() -> Table:
    """A row for each experiment and try."""
    taken = {name: TRIES.index(dict(chosen(name))) for name in QUESTIONS[HOME]}
    records = [
        record | TRIES[record["try"]]
        | {"question": asked(record["experiment"])[0],
           "taken": "yes" if taken[record["experiment"]] == record["try"] else ""}
        for record in _records()
    ]  # fmt: skip
    columns = {
        "rate of": text("question"), "updates a round": text("updates_per_round"),
        "learning rate": text("learning_rate"), "rise": number("rise", "+.3f"),
        "last round minus the base model": number("paired", "+.3f"),
        "recognised, worse seed's share of the first": number("kept", ".2f"),
        "taken": text("taken"),
    }  # fmt: skip
    return Table(records, columns, left=("rate of", "taken"))


if __name__ == "__main__":
    with said_in_one_line():
        measure(sys.argv[1:])
