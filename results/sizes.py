"""Whether methods rank alike on UNets half and twice as large as version 2's.

The runs are those of `tiny2/grid.toml` on the two other models, as PROTOCOL.md says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from d3po_bench.runs.packed import PACKED
from eval.analysis.ranks import rank_agreement
from eval.analysis.tables import Record, Table, over_seeds, spread, text
from results.version2 import Seeds, main_rows, published, rewards

HOME = Path(__file__).resolve().parent
FOLDERS = {"half": HOME / "sizes" / "half", "version 2": HOME / "tiny2",
           "double": HOME / "sizes" / "double"}  # fmt: skip
"""Size of the UNet -> where its runs are published."""

Found = Mapping[str, Mapping[str, Seeds]]
"""Size -> method -> S of each seed."""


def tables(folders: Mapping[str, Path] = FOLDERS) -> dict[str, Callable[[], Table]]:
    """Name -> what makes it, once all runs are there."""
    there = all((folder / PACKED).is_file() for folder in folders.values())
    made: dict[str, Callable[[Found], Table]] = {"v2-sizes": sizes, "v2-ranks": ranks}
    return {name: partial(_made, table, folders) for name, table in made.items() if there}


def _made(table: Callable[[Found], Table], folders: Mapping[str, Path]) -> Table:
    return table({size: rewards(main_rows(published(place))) for size, place in folders.items()})


def sizes(found: Found) -> Table:
    """A row for each method: S on each size, and its rank there."""
    records: dict[str, Record] = {}
    for size, methods in found.items():
        means = {method: np.mean([*seeds.values()]) for method, seeds in methods.items()}
        for method, seeds in methods.items():
            record = records.setdefault(method, {"method": method})
            record |= over_seeds(size, [*seeds.values()])
            record[f"{size}_rank"] = 1 + sum(mean > means[method] for mean in means.values())
    columns = {"method": text("method")}
    for size in found:
        columns[f"S, {size} (95 % interval)"] = spread(size)
        columns[f"rank, {size}"] = text(f"{size}_rank")
    return Table([*records.values()], columns, left=("method",))


def ranks(found: Found) -> Table:
    """A row for each two sizes: how far they put the methods in the same order."""
    records = []
    for one, other in combinations(found, 2):
        tau, low, high = rank_agreement(*(_seeds(found[size], found[one]) for size in (one, other)))
        records.append({"sizes": f"{one}, {other}", "tau": tau, "tau_low": low, "tau_high": high})
    columns = {"sizes": text("sizes"), "Kendall's tau (95 % interval)": spread("tau")}
    return Table(records, columns, left=("sizes",))


def _seeds(found: Mapping[str, Seeds], order: Mapping[str, Seeds]) -> Any:
    """S [seeds, methods] of the seeds that all methods have."""
    shared = set.intersection(*(set(seeds) for seeds in found.values()))
    return [[found[method][seed] for method in order] for seed in sorted(shared)]
