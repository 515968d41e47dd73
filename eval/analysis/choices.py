"""Raters' first choices between the models of Table 1, a file of shares for each seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from d3po_bench.errors import UserError
from d3po_bench.feedback.rounds import Pool
from d3po_bench.runs.files import read_csv
from eval.analysis.statistics import interval

NEEDED = ("source", "share", "raters")
"""Columns of a file; `d3po-bench feedback choices --out` writes more."""

REMEDY = "Write it again with `d3po-bench feedback choices FOLDER --out FILE`."


@dataclass(frozen=True)
class Choices:
    """Shares of first choices, of the same models in each file."""

    shares: tuple[dict[str, float], ...]
    """Of each file: model -> 0 to 1."""
    raters: Pool

    @property
    def heading(self) -> str:
        """Of the column; nobody shall take simulated raters for people."""
        return "first choices" if self.raters == "people" else "first choices, simulated raters"

    @property
    def said(self) -> str:
        """What the column holds, in a sentence."""
        who = "people" if self.raters == "people" else "simulated raters, not people,"
        return (
            f"First choices: how often {who} preferred a model's picture to those of the others "
            f"compared; mean and 95 % interval over {len(self.shares)} seeds."
        )

    def cell(self, model: str) -> str:
        """Mean over files and its 95 % interval, in per cent; nothing for a model without any."""
        if model not in self.shares[0]:
            return ""
        values = np.array([100 * share[model] for share in self.shares])
        low, high = np.clip(interval(values), 0, 100)  # a few seeds' t reaches far beyond
        spread = "" if np.isnan(low) else f" ({low:.1f} to {high:.1f})"
        return f"{values.mean():.1f} %{spread}"


def read(folder: Path, models: Sequence[str]) -> Choices | None:
    """The shares in `folder`/*.csv; None where there is no file.

    A row belongs to the model that its source, a path, names last: by a part that is MODEL or
    MODEL-SEED, as `drawn/d3po-0/pictures`.

    Raises:
        UserError: a file is malformed, is of other models than the others or of none of `models`,
            or people's and simulated votes come together.
    """
    files = {path: _rows(path) for path in sorted(folder.glob("*.csv"))}
    if not files:
        return None
    shares = {path: _shares(path, rows, models) for path, rows in files.items()}
    first = next(iter(shares))
    for path, found in shares.items():
        if found.keys() != shares[first].keys():
            raise UserError(
                f"The files in {folder} compare different models: {', '.join(found)} in "
                f"{path.name}, {', '.join(shares[first])} in {first.name}. A share only has a "
                "meaning among the models compared: leave some files out."
            )
    return Choices(tuple(shares.values()), _raters(folder, files))


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_csv(path)
    missing = [name for name in NEEDED if not rows or rows[0].get(name) is None]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]}; it needs {', '.join(NEEDED)}. {REMEDY}"
        )
    return rows


def _shares(path: Path, rows: Sequence[dict[str, Any]], models: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        model = _model(path, row["source"], models)
        if model in found:
            raise UserError(f"{path} names {model} twice. Write a file for each seed.")
        found[model] = _share(path, row["share"])
    return found


def _model(path: Path, source: Any, models: Sequence[str]) -> str:
    named = re.compile(rf"({'|'.join(map(re.escape, models))})(-\d+)?")
    fitting = [m[1] for part in PurePath(source or "").parts if (m := named.fullmatch(part))]
    if not fitting:
        raise UserError(
            f"The source {ascii(source)[:80]} in {path} names none of {', '.join(models)}. Keep "
            f"pictures in a folder such as {models[-1]}-0."
        )
    return fitting[-1]


def _share(path: Path, text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value <= 1:
        raise UserError(f"The share {ascii(text)[:40]} in {path} is not from 0 to 1. {REMEDY}")
    return value


def _raters(folder: Path, files: dict[Path, list[dict[str, Any]]]) -> Pool:
    said = {path: {str(row["raters"]) for row in rows} for path, rows in files.items()}
    everything = set[str]().union(*said.values())
    if everything == {"people"}:
        return "people"
    if everything == {"simulated"}:
        return "simulated"
    raise UserError(
        f"The files in {folder} mix raters: "
        f"{', '.join(ascii(name)[:40] for name in sorted(everything))}. Keep files of people and "
        "of simulated raters apart."
    )
