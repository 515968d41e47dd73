"""The rows behind Table 1: what each model's pictures of the held-out captions were scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from d3po_bench.errors import UserError
from d3po_bench.runs.files import read_csv, readable
from d3po_bench.scoring import KL_OF_STEP
from eval.analysis.statistics import Difference, from_zero
from eval.analysis.tables import as_numbers

BASE = "no fine-tune"
BASE_ROWS = "no-fine-tune"
"""Its name among files, where methods have METHOD-SEED."""

METHODS = ("preferred_images", "reward_weighted", "d3po", "ddpo", "dpok")
"""Those of the paper's Table 1 and Figure 3, in the table's order; others come after them."""

SAMPLER = "eta1"
"""Of the printed table; the rows hold both."""


def gained(out: Path) -> dict[tuple[str, str], Difference]:
    """Method and column -> the gain over the base model, tested over seeds; from OUT/rows.

    Without columns in which a scorer had nothing to say.
    """
    rows = rows_of(out)
    found = {
        (method, column): gains(runs_of(method, rows), rows[BASE_ROWS], column)
        for method in methods(rows)[1:]
        for column in columns(rows)
    }
    return {name: from_zero(seeds) for name, seeds in found.items() if np.isfinite(seeds).all()}


def rows_of(out: Path) -> dict[str, pd.DataFrame]:
    """METHOD-SEED -> scores by prompt and index, printed sampler.

    Raises:
        UserError: there are none of the base model, or some cannot be compared with those.
    """
    found = {}
    for path in sorted((out / "rows").glob("*.csv")):
        with readable(path):
            rows = pd.DataFrame(read_csv(path))
            rows = rows[rows["sampler"] == SAMPLER].set_index(["prompt", "index"]).sort_index()
            rows = rows.apply(as_numbers)
        found[path.stem] = rows
    if BASE_ROWS not in found:
        raise UserError(
            f"{out / 'rows'} has no rows of {BASE_ROWS}. Run `d3po-bench table1` with that --out."
        )
    for name, rows in found.items():
        if not rows.index.equals(found[BASE_ROWS].index):
            raise UserError(
                f"The rows of {name} in {out} are of other prompts or noise. Remove that file and "
                "give the command again."
            )
    _require_comparable(found, out)
    return found


def _require_comparable(found: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Refuse rows of other columns, of scorers with other weights, or that are no numbers."""
    made = {
        name: [", ".join(rows.columns), *sorted(map(str, set(rows.get("weights", ()))))]
        for name, rows in found.items()
    }
    for name, rows in found.items():
        if made[name] != made[BASE_ROWS]:
            wanted, got = (" / ".join(made[part]) for part in (BASE_ROWS, name))
            raise UserError(
                f"The rows of {name} in {out} are of other scorers or weights ({got}) than those "
                f"of {BASE_ROWS} ({wanted}). Remove that file and give the command again."
            )
        for column in columns(found):
            # NaN is an image that the scorer has nothing to say about.
            if rows[column].dtype.kind not in "fi" or np.isinf(rows[column]).any():
                raise UserError(
                    f"The rows of {name} in {out} hold text or infinity as {column}. Remove that "
                    "file and give the command again."
                )


def methods(rows: Mapping[str, pd.DataFrame]) -> list[str]:
    """The base model, and the methods that have rows, in the order of the table."""
    there = {name.rpartition("-")[0] for name in rows if name != BASE_ROWS}
    return [BASE, *(m for m in METHODS if m in there), *sorted(there.difference(METHODS))]


def columns(rows: Mapping[str, pd.DataFrame]) -> list[str]:
    """Those of scorers, without parts that concern some prompts alone, as GenEval's kinds do."""
    known = {"steps", "guidance", "size", "sampler", "weights", "kl", "drift"}
    base = rows[BASE_ROWS]
    found = [c for c in base.columns if c not in known and not KL_OF_STEP.fullmatch(c)]
    parts = [c for c in found if base[c].isna().any()]
    return [c for c in found if c not in parts or not any(c.startswith(f"{n}_") for n in found)]


def runs_of(method: str, rows: Mapping[str, pd.DataFrame]) -> list[pd.DataFrame]:
    """The rows of each of its seeds."""
    return [found for name, found in rows.items() if name.rpartition("-")[0] == method]


def gains(runs: Sequence[pd.DataFrame], base: pd.DataFrame, column: str) -> list[float]:
    """Of each run, how much more than the base model it scores on the same prompts and noise."""
    return [float((run[column] - base[column]).mean()) for run in runs]
