"""diversity.csv: what `report --measure` found of runs and their base models.

It lies in the folder of the model, MODEL/OBJECTIVE/METHOD/seed-N being those of its runs. A row
names what it was measured of, so that a run in the place of another has none of its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d3po_bench.digests import short
from d3po_bench.runs.files import read_csv, readable
from d3po_bench.runs.run import LORA
from eval.analysis.runs import DRAWN, Run

BASE = "no-fine-tune"
"""The base model, where a method is named."""

NUMBERS = ("diversity", "aesthetic", "jpeg_size")
LATER = ("vendi", "coverage")
"""Numbers that rows of earlier versions lack."""

OF = "of"
"""Column that names what was measured; rows of earlier versions lack it."""

Row = dict[str, Any]


def place(run: Run) -> Path | None:
    """Where the numbers of a run lie, or would; None for a run outside of its folders."""
    folder, (_, *names) = run.files.place.resolve(), run.group
    own = folder.parts[-3:] == (*names, f"seed-{run.seed}")
    return folder.parents[2] / "diversity.csv" if own else None


def row_of(run: Run, *, base: bool) -> Row:
    """The row of a run, or of its base model, without its numbers."""
    _, objective, method = run.group
    facts, settings = run.files.facts, run.config
    began = facts.get("inputs", {})
    made: list[Any] = [began.get("model"), began.get("prompts")]
    if base:
        made.append([getattr(settings, name) for name in (*DRAWN, "dtype", "long_prompts")])
    else:
        weights = {n: d for n, d in facts.get("content", {}).items() if n.startswith(LORA)}
        made += [facts.get("run_id"), weights]
    own: Row = {"method": BASE, "seed": ""} if base else {"method": method, "seed": str(run.seed)}
    return {"objective": objective, **own, OF: short(json.dumps(made, sort_keys=True))}


def key(row: Row) -> tuple[str, ...]:
    """Names a row."""
    return row["objective"], row["method"], row["seed"]


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        UserError: a column is missing, or a number is none.
    """
    rows: list[Row] = read_csv(path)
    with readable(path):
        for row in rows:
            _ = key(row), [float(row[name]) for name in NUMBERS], [number(row, n) for n in LATER]
    return rows


def whole(row: Row) -> bool:
    """Whether a row has all that this version measures."""
    return bool(row.get(OF) and row.get("vendi"))


def number(row: Row | None, name: str) -> float:
    """A number of a row; NaN where it was not measured.

    Raises:
        ValueError: it is none.
    """
    return float((row or {}).get(name) or "nan")


def found(run: Run, rows: Sequence[Row], *, base: bool) -> Row | None:
    """What was measured of a run, or of its base model; None where nothing was."""
    wanted = row_of(run, base=base)
    mine = (row for row in rows if key(row) == key(wanted))
    return next((row for row in mine if row.get(OF) in (None, "", wanted[OF])), None)


def numbers(run: Run) -> tuple[Row | None, Row | None]:
    """What was measured of the base model and of the run.

    Raises:
        UserError: the file is damaged.
    """
    path = place(run)
    rows = read(path) if path else []
    return found(run, rows, base=True), found(run, rows, base=False)
