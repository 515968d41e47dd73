"""A table: records of plain numbers for programs, and the cells that people read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d3po_bench.runs.files import csv_bytes
from eval.analysis.statistics import between, interval

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]
"""Field -> text or number; NaN where a run did not measure it."""

Cell = Callable[[Record], str]


@dataclass(frozen=True)
class Table:
    """Records, and how each of its columns shows one."""

    records: Sequence[Record]
    columns: Mapping[str, Cell]
    """Heading -> what it shows of a record."""
    left: Sequence[str] = ()
    """Headings of text; the other columns hold numbers and are set to the right."""
    title: str = ""

    def cells(self) -> list[list[str]]:
        """The headings, and below them what each record shows; no column that is empty."""
        rows = [[show(record) for show in self.columns.values()] for record in self.records]
        kept = (
            [any(cells) for cells in zip(*rows, strict=True)]
            if rows
            else [True] * len(self.columns)
        )
        return [[cell for cell, keep in zip(row, kept, strict=True) if keep]
                for row in ([*self.columns], *rows)]  # fmt: skip

    def plain(self) -> str:
        """The cells in columns that are as wide as they need to be, for a terminal."""
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = ["<" if name in self.left else ">" for name in rows[0]]
        forms = list(zip(sides, widths, strict=True))
        lines = (
            "  ".join(
                f"{cell:{side}{width}}" for cell, (side, width) in zip(row, forms, strict=True)
            )
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """The cells as a Markdown table, below its title."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        head, *body = [f"| {' | '.join(cells)} |" for cells in rows]
        rule = "|".join("---" if name in self.left else "--:" for name in self.cells()[0])
        title = [self.title, ""] if self.title else []
        return "\n".join([*title, head, f"|{rule}|", *body])

    def latex(self) -> str:
        """The cells as a LaTeX tabular for the package booktabs, below its title."""
        rows = [[in_latex(cell) for cell in row] for row in self.cells()]
        head, *body = [f"{' & '.join(cells)} \\\\" for cells in rows]
        spec = "".join("l" if name in self.left else "r" for name in self.cells()[0])
        title = [in_latex(self.title), ""] if self.title else []
        return "\n".join(
            [*title, f"\\begin{{tabular}}{{{spec}}}", "\\toprule", head, "\\midrule", *body,
             "\\bottomrule", "\\end{tabular}"]
        )  # fmt: skip


_LATEX = str.maketrans({
    **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "†": r"$\dagger$", "→": r"$\to$", "−": "$-$",
})  # fmt: skip


def in_latex(words: str) -> str:
    """What people read, as LaTeX prints it: minus signs and arrows, and code from backticks."""
    signs = re.sub(r"(?<![\w.])-(?=\d)", "−", words.replace("->", "→"))
    parts = signs.translate(_LATEX).split("`")
    return "".join(f"\\texttt{{{p}}}" if i % 2 else p for i, p in enumerate(parts))


def text(field: str) -> Cell:
    """A column of words."""
    return lambda record: str(record[field])


def number(field: str, form: str) -> Cell:
    """A column of numbers in that format; empty where one is NaN."""
    return lambda record: shown(record[field], form)


def change(field: str, form: str) -> Cell:
    """A column of `before -> after`, from FIELD_before and FIELD."""

    def show(record: Record) -> str:
        before, after = (shown(record[name], form) for name in (f"{field}_before", field))
        return f"{before} -> {after}" if after else ""

    return show


def spread(field: str, prefix: str | None = None) -> Cell:
    """A column of means with their intervals, from FIELD, PREFIX_low and PREFIX_high."""
    low, high = ends(field if prefix is None else prefix)
    return lambda record: (
        "" if math.isnan(record[field]) else between(record[field], record[low], record[high])
    )


def over_seeds(name: str, values: Any) -> Record:
    """NAME, NAME_low and NAME_high: the mean of [S] values, one for each seed, and its interval."""
    import numpy as np

    low, high = map(float, interval(values))
    return {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}


def ends(prefix: str) -> tuple[str, str]:
    """The fields of an interval: PREFIX_low and PREFIX_high, or low and high."""
    start = f"{prefix}_" if prefix else ""
    return f"{start}low", f"{start}high"


def shown(value: float, form: str) -> str:
    """The number in that format; nothing for NaN."""
    return "" if math.isnan(value) else format(value, form)


def as_csv(records: Sequence[Record]) -> str:
    """The records as CSV, a number that was not measured as an empty cell."""
    return csv_bytes(finite(records)).decode()


def finite(records: Sequence[Record]) -> list[Record]:
    """The records with None for a number that was not measured: JSON knows no NaN."""
    return [{k: None if v != v else v for k, v in record.items()} for record in records]


def as_numbers(column: pd.Series) -> pd.Series:
    """A column of text as numbers, where it has no other text; prompts are no column but the index.

    pandas' own reader would take the prompts 1, 01 and 1.0 for one, and NA and null for none.
    """
    try:
        return column.replace("", "nan").astype(float)
    except ValueError:
        return column
