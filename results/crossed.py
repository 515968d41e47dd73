"""What learning one objective does to the scores of another: a table of docs/comparison.md.

    python results/crossed.py results/tiny

From diversity.csv, which `results/diversity.py` measured: gains over the base model, means over
four pictures of each animal, with 95 % intervals over seeds.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench.errors import UserError, said_in_one_line
from d3po_bench.runs.files import read_csv
from eval.analysis.statistics import mean_told

SCORERS = {"jpeg_size": "JPEG size, kB", "aesthetic": "aesthetic score, points"}
BASE = "no-fine-tune"

Row = dict[str, Any]


def line(objective: str, method: str, rows: list[Row], base: Row) -> str:
    """One method on one objective."""
    gains = {s: np.array([float(r[s]) - float(base[s]) for r in rows]) for s in SCORERS}
    cells = [method, objective, str(len(rows)), *(mean_told(gains[s]) for s in SCORERS)]
    return f"| {' | '.join(cells)} |"


def table(folder: Path) -> str:
    """A line for each method and what it learnt.

    Raises:
        UserError: what it is made from is not there.
    """
    path = folder / "diversity.csv"
    if not path.is_file():
        raise UserError(
            f"Expected {path}, got no such file. Measure it: python results/diversity.py RUNS"
        )
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in read_csv(path):
        groups[row["method"], row["objective"]].append(row)
    names = ["method", "learnt", "seeds", *SCORERS.values()]
    head = [f"| {' | '.join(names)} |", "|---|---|" + "--:|" * (len(names) - 2)]
    body = [
        line(objective, method, rows, groups[BASE, objective][0])
        for (method, objective), rows in sorted(groups.items())
        if method != BASE
    ]
    return "\n".join([*head, *body])


if __name__ == "__main__":
    with said_in_one_line():
        print(table(Path(sys.argv[1])))
