"""Which denoising steps to learn from: the ablation of PROTOCOL.md, on development seeds.

    python -m results.steps runs/steps

makes the runs of tiny2/steps.toml once for each way and rate below, resumes where it was
interrupted, and writes steps.csv.
"""

from __future__ import annotations

import math
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from d3po_bench.errors import said_in_one_line
from d3po_bench.launch import grid
from d3po_bench.launch.rule import Rule, Seen, seen_of
from d3po_bench.runs.files import csv_bytes, read_csv, write_atomically
from eval.analysis.gains import Groups, both_ends, both_signs, gained
from eval.analysis.runs import Run, read_groups
from eval.analysis.scores import score_of
from eval.analysis.tables import Record, Table, number, text
from eval.tools import TOOLS
from results.claims import bullets

HERE = Path(__file__).resolve().parent
GRID, FILE = HERE / "tiny2" / "steps.toml", HERE / "steps.csv"

SEARCH = tomllib.loads((HERE / "protocol.toml").read_text(encoding="utf-8"))["tune"]
RULE = Rule(recognised=SEARCH["recognised"], drift=SEARCH["drift"])
"""The search, and its bounds."""

WAYS = {
    "all steps": {"skip_steps": "0"},
    "first half": {"skip_steps": "5"},
    "log-SNR": {"skip_steps": "0", "timestep_spacing": "log_snr"},
    "weights 1/w": {"skip_steps": "0", "step_weight": "inverse"},
    "windows of 3": {"skip_steps": "0", "window": "3"},
}
"""Which steps count for how much -> the settings for it, whatever the search has chosen."""

FACTORS = (0.5, 1, 2)
"""Of the rate that the search has chosen: other steps may want another."""


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def measure(out: Path, jobs: int, device: str) -> None:
    """Make the runs below OUT, and write steps.csv."""
    cells = list(parts(out))
    for _, _, part, place in cells:
        grid.run(part, TOOLS, out=place, jobs=jobs, device=device, resume=True)
    # Only now: before, a place may hold runs of another method that were interrupted.
    rows = [row for way, rate, part, place in cells
            for row in _rows(way, part.methods[0], rate, place / part.model)]  # fmt: skip
    write_atomically(FILE, csv_bytes(rows))


def parts(out: Path) -> Iterator[tuple[str, str, grid.Grid, Path]]:
    """Way, rate, grid of one method, and where its runs lie below `out`."""
    asked = grid.read(GRID)
    for way, factor, method in product(WAYS, FACTORS, asked.methods):
        rate = f"{factor * float(asked.method[method]['learning_rate']):.3g}"
        own = grid.part(asked, [method], (), None)
        place = out / f"{way.replace(' ', '-').replace('/', '-')}-{factor:g}"
        yield way, rate, grid.other(own, None, {**WAYS[way], "learning_rate": rate}), place


def _rows(way: str, method: str, rate: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each seed: S and D, and of the worse of its two runs drift and recognised."""
    groups = {group: runs for group, runs in read_groups([folder]).items() if group[2] == method}
    ((_, seeds),) = both_signs(groups).items()
    for seed, seen in worst(groups)[method].items():
        numbers = {"s": seen.gain, "d": fmean(seeds[seed]), "drift": seen.drift,
                   "recognised": seen.recognised}  # fmt: skip
        yield {"steps": way, "method": method, "rate": rate, "seed": seed,
               **{name: f"{value:.6f}" for name, value in numbers.items()}}  # fmt: skip


def worst(groups: Groups, animal: str = "animal") -> dict[str, dict[int, Seen]]:
    """Method -> seed -> S, and of its runs for both signs the least recognised, the most drift.

    Args:
        groups: runs for both signs.
        animal: the second judge's column.
    """
    found = {}
    for (objectives, method), seeds in both_signs(groups).items():
        runs = [run for (_, objective, name), of in groups.items() for run in of
                if name == method and objective in objectives.split(", ")]  # fmt: skip
        found[method] = {
            seed: _seen_of([r for r in runs if r.seed == seed], animal) for seed in seeds
        }
    return found


def _seen_of(runs: Sequence[Run], animal: str) -> Seen:
    """What the runs of one seed showed, one for each sign."""
    ends = [{"gain": gained([run])[run.seed], "recognised": both_ends(run, animal)[1],
             "drift": both_ends(run, "drift")[1]} for run in runs]  # fmt: skip
    return seen_of(ends, [score_of(run.files).sign for run in runs])


def tables() -> dict[str, Callable[[], Table]]:
    """Name -> what makes it, once it was measured."""
    return {"v2-steps": table} if FILE.is_file() else {}


def sentences() -> dict[str, Callable[[], str]]:
    """Likewise."""
    return {"claims-steps": said} if FILE.is_file() else {}


def table() -> Table:
    """A row for each method and way: of the rates within the bounds, the one with the largest S."""
    cells: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for row in read_csv(FILE):
        cell = cells.setdefault((row["method"], row["steps"]), {})
        cell.setdefault(row["rate"], []).append(row)
    records = [_record(*names, rates) for names, rates in sorted(cells.items())]
    columns = {
        "method": text("method"), "steps": text("steps"), "seeds": text("seeds"),
        "S": number("s", "+.3f"), "rate": text("rate"), "S at other rates": text("others"),
        "D": number("d", "+.3f"), "drift": number("drift", ".4f"),
        "recognised": number("recognised", ".2f"),
    }  # fmt: skip
    return Table(records, columns, left=("method", "steps", "S at other rates"))


def said() -> str:
    """Which way the protocol's rule takes: the one with the largest S of each method."""
    best: dict[str, Record] = {}
    kept = [record for record in table().records if record["kept"]]
    for record in sorted(kept, key=lambda record: -record["s"]):
        best.setdefault(record["method"], record)
    ways = {record["steps"] for record in best.values()}
    return bullets([
        "Within the bounds, the largest S: "
        + ", ".join(f"{r['steps']} with {m} ({r['s']:+.3f} kB)" for m, r in best.items()) + ".",
        f"So presets of later versions take {ways.pop()}." if len(ways) == 1
        else "No way is the best with both methods.",
    ])  # fmt: skip


def _record(method: str, way: str, rates: Mapping[str, list[Record]]) -> Record:
    worth = {rate: RULE.worth([_seen(row) for row in rows]) for rate, rows in rates.items()}
    means = {rate: {name: fmean(float(row[name]) for row in rows) for name in NUMBERS}
             for rate, rows in rates.items()}  # fmt: skip
    # Where no rate keeps to the bounds, the one that drifts least stands for the way.
    best = max(means, key=lambda rate: (-math.inf if (found := worth[rate]) is None else found,
                                        -means[rate]["drift"]))  # fmt: skip
    others = ", ".join(
        f"{means[rate]['s']:+.3f} ({rate}{'' if worth[rate] is not None else ', out of bounds'})"
        for rate in means
        if rate != best
    )
    kept = worth[best] is not None
    rate = best if kept else f"{best}, out of bounds"
    return {"method": method, "steps": way, "rate": rate, "kept": kept, "others": others,
            "seeds": len(rates[best]), **means[best]}  # fmt: skip


def _seen(row: Record) -> Seen:
    return Seen(*(float(row[name]) for name in ("s", "recognised", "drift")))


NUMBERS = ("s", "d", "drift", "recognised")

if __name__ == "__main__":
    with said_in_one_line():
        measure(sys.argv[1:])
