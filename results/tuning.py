"""Tables of a search: what `d3po-bench tune` tried, and what was chosen of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from d3po_bench.errors import UserError
from d3po_bench.runs.files import read_csv
from eval.analysis.tables import Record, Table, number, text

TRIALS = "trials.csv"
"""What `d3po-bench tune` wrote."""


def tuning(path: Path, sought: str = "S") -> Table:
    """A row for each method of a search: its trials, and what was chosen of them."""
    rows = read_csv(path)
    columns = {
        "method": text("method"), "trials": text("trials"), "kept the bounds": _kept,
        f"rates with {sought} above 0, within the bounds": text("window"),
        sought: number("s", "+.3f"), "recognised": number("recognised", ".2f"),
        "drift": number("drift", ".4f"), "chosen": text("settings"),
    }  # fmt: skip
    records = [
        _tuned([row for row in rows if row["method"] == method])
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return Table(records, columns, left=("method", "kept the bounds", "chosen"))


def trials(path: Path, methods: Sequence[str]) -> Table:
    """A row for each trial of some methods, each method's in the order of their rates."""
    found = [row for row in read_csv(path) if row["method"] in methods]
    found.sort(key=lambda row: (methods.index(row["method"]), float(row["learning_rate"])))
    columns = {
        "method": text("method"), "trial": text("trial"), "S": number("s", "+.3f"),
        "recognised": number("recognised", ".2f"), "drift": number("drift", ".4f"),
        "bounds": text("bounds"), "settings": text("settings"),
    }  # fmt: skip
    return Table([_trial(row) for row in found], columns, left=("method", "bounds", "settings"))


def chosen_of(trials: Sequence[Record]) -> tuple[Record, dict[str, str]]:
    """Of the trials of a method the chosen one, else the one that drifted least; its settings.

    Raises:
        UserError: none has ended.
    """
    chosen = next((row for row in trials if row["chosen"]), None)
    ended = [row for row in trials if math.isfinite(float(row["drift"] or "nan"))]
    if not chosen and not ended:
        raise UserError(f"No trial of {trials[0]['method']} has ended. Search it again.")
    row = chosen or min(ended, key=lambda row: float(row["drift"]))
    return row, _settings(row)


def _tuned(trials: list[Record]) -> Record:
    rates = sorted(float(r["learning_rate"]) for r in trials if float(r["value"] or "nan") > 0)
    window = " to ".join(f"{rate:g}" for rate in dict.fromkeys([*rates[:1], *rates[-1:]]))
    return _trial(chosen_of(trials)[0]) | {
        "trials": len(trials), "kept": sum(bool(row["value"]) for row in trials),
        "window": f"{window} ({len(rates)} trials)" if rates else "none",
    }  # fmt: skip


def _trial(row: Record) -> Record:
    seen = [float(v) for name, v in row.items() if name.startswith("gain, seed") and v]
    return {
        "method": row["method"], "trial": row["trial"], "s": fmean(seen) if seen else math.nan,
        "recognised": float(row["recognised"] or "nan"), "drift": float(row["drift"] or "nan"),
        "bounds": row["why"] or "kept" + ", chosen" * bool(row["chosen"]),
        "settings": " ".join(f"{name}={value}" for name, value in _settings(row).items()),
    }  # fmt: skip


def _settings(row: Record) -> dict[str, str]:
    names = [*row][[*row].index("drift") + 1 :]
    return {name: row[name] for name in names if row[name]}


def _kept(record: Record) -> str:
    found = f"{record['kept']} of {record['trials']}"
    return found if record["kept"] else f"{found}: the least drifting is taken"
