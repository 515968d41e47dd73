"""What an evaluation says as a whole: means, and columns that say nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from d3po_bench.runs.files import read_csv
from d3po_bench.scoring import KL_OF_STEP

FACTS = {"steps", "guidance", "size", "sampler", "prompt", "index", "weights", "file"}
"""Columns of rows.csv that are no measure."""


def summary(out: Path) -> Iterator[dict[str, Any]]:
    """The mean of every column of rows.csv, for each sampler, without the KL of single steps."""
    rows = read_csv(out / "rows.csv")
    for sampler in dict.fromkeys(row.get("sampler", "") for row in rows):
        mine = [row for row in rows if row.get("sampler", "") == sampler]
        for column in _measures(mine[0]):
            values = [float(row[column]) for row in mine if _known(row[column])]
            if values:
                mean = sum(values) / len(values)
                yield {"sampler": sampler, "column": column, "mean": mean, "images": len(values)}


def silence(out: Path, note: Callable[[str], None]) -> None:
    """Tell people of columns that have no number in any row."""
    rows = read_csv(out / "rows.csv")
    silent = [c for c in _measures(rows[0]) if not any(_known(row[c]) for row in rows)]
    if silent:
        note(
            f"no image has a number of {', '.join(silent)}: it says nothing of these prompts, or "
            "compares several --images of each"
        )


def _measures(row: Mapping[str, str]) -> list[str]:
    return [name for name in row if name not in FACTS and not KL_OF_STEP.fullmatch(name)]


def _known(value: str) -> bool:
    return value not in ("", "nan")
