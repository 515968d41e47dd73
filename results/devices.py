"""What a card changes: runs on version 2 that were made on an H100 and on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from d3po_bench.launch.rule import Seen, seen_of
from d3po_bench.runs.files import read_csv
from d3po_bench.runs.run import find_runs
from eval.analysis.gains import Groups, gained
from eval.analysis.statistics import by_seed
from eval.analysis.tables import Record, Table, number, over_seeds, spread, text
from eval.analysis.tries import ends
from results.steps import RULE
from results.tuning import TRIALS
from results.version2 import SIGNS, published, there

HOME = Path(__file__).resolve().parent
V2 = HOME / "tiny2"
CARD = HOME / "tiny2-h100"
"""Test runs that were made on a card, too."""

AGAIN = HOME / "search2" / "again"
"""Trials of a card that were made again on a CPU."""


def tables() -> dict[str, Callable[[], Table]]:
    """Name -> what makes it, of what is there."""
    made: dict[str, Callable[[], Table]] = {}
    if there(CARD):
        made["v2-devices"] = lambda: tests(published(V2), published(CARD))
    if there(AGAIN):
        made["v2-again"] = partial(trials, AGAIN, V2 / TRIALS)
    return made


def tests(cpu: Groups, card: Groups) -> Table:
    """A row for each objective and method: what the card changes, seed by seed."""
    found: list[Record] = []
    for (model, objective, method), runs in card.items():
        here, theirs = gained(cpu[model, objective, method]), gained(runs)
        ours = {seed: here[seed] for seed in theirs}
        test = by_seed(theirs, ours)
        found.append({
            "objective": objective, "method": method, "seeds": len(theirs),
            **over_seeds("card", [*theirs.values()]),
            **over_seeds("cpu", [*ours.values()]),
            "thousandths": 1e3 * test.mean, "thousandths_low": 1e3 * test.low,
            "thousandths_high": 1e3 * test.high,
        })  # fmt: skip
    columns = {
        "objective": text("objective"), "method": text("method"), "seeds": text("seeds"),
        "gain on a CPU (95 % interval)": spread("cpu"),
        "gain on an H100 (95 % interval)": spread("card"),
        "difference, seed by seed, in thousandths (95 % interval)": spread("thousandths"),
    }  # fmt: skip
    return Table(found, columns, left=("objective", "method"))


def trials(cpu: Path, table: Path) -> Table:
    """A row for each trial of a card that was made again on a CPU.

    Args:
        cpu: its runs there, one that was to grow the score and one that was to shrink it.
        table: what the search wrote.
    """
    runs: dict[tuple[str, float], dict[str, Mapping[str, float]]] = {}
    for run in find_runs([cpu]):
        key = (run.config.method, run.config.learning_rate)
        runs.setdefault(key, {})[run.config.objective] = ends(run.folder)
    found = [
        _trial(row, runs[key])
        for row in read_csv(table)
        if (key := (row["method"], float(row["learning_rate"]))) in runs
    ]
    columns = {"method": text("method"), "trial": text("trial"), "rate": text("learning_rate")}
    for place, name in (("card", "H100"), ("cpu", "CPU")):
        columns |= {
            f"S, {name}": number(f"s_{place}", "+.3f"),
            f"recognised, {name}": number(f"recognised_{place}", ".3f"),
            f"kept the bounds, {name}": text(f"kept_{place}"),
        }
    return Table(found, columns, left=("method",))


def _trial(row: Record, runs: Mapping[str, Mapping[str, float]]) -> Record:
    seen = {
        "card": Seen(float(row["gain, seed 901"]), float(row["recognised"]), float(row["drift"])),
        "cpu": seen_of([runs[name] for name in SIGNS], (1, -1)),
    }
    found = {name: row[name] for name in ("method", "trial", "learning_rate")}
    for place, one in seen.items():
        found |= {
            f"s_{place}": one.gain, f"recognised_{place}": one.recognised,
            f"kept_{place}": "no" if RULE.broken(one) else "yes",
        }  # fmt: skip
    return found
