"""What published results say of themselves, and whether they still say it when it is done again.

`claims.json` of a folder of results names scripts and grids; places are relative to the folder's
parent, where the documents lie:

- grids: which runs there are, {"grid": FILE, "runs": FOLDER};
- tables: printed by a script, {"document": FILE, "command": [SCRIPT, ...]};
- numbers: of a sentence, each in a cell, {"document": FILE, "text": SENTENCE,
  "cells": [[START OF THE LINE, COLUMN], ...], "table": DOCUMENT WITH THE CELLS, if another};
- curves: drawn by `plot`, {"figure": FILE, "runs": FOLDER, "x": AXIS};
- figures: drawn by a script into the folder that it is given as its last argument,
  {"figures": [FILE, ...], "command": [SCRIPT, ...]};
- unchecked: what is not made again, {"figures": [FILE, ...], "why": REASON}, or instead of
  figures "tables": [FIRST LINE, ...];
- tries: folders of runs that may have been stopped, by their names below the folder of results.

Figures, grids and tables of numbers that no claim names are problems, too: their claims cannot be
taken out unseen, and what is moved to `unchecked` is printed (`not_made_again`). A claim of
`numbers` can: most sentences have none, so that one without does not show.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

from d3po_bench.errors import UserError
from d3po_bench.runs.run import read_config, read_object

CLAIMS = "claims.json"
KINDS = {
    "grids": dict, "tables": dict, "numbers": dict, "curves": dict, "figures": dict,
    "unchecked": dict, "tries": str,
}  # fmt: skip
DOCUMENTS = ("README.md", "docs/*.md")
GRID = "grid.toml"
PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".pdf")

MOST_APART = 32
"""Of 255, between a pixel of a published figure and of the same figure drawn again."""
MOST_OTHERS = 1e-3
"""Share of pixels that differ at all between the two."""

Claim = Mapping[str, Any]
Problems = Iterator[str]


def read(folder: Path) -> dict[str, Any]:
    """The claims of a folder: lists of objects, and a list of names; {} where there are none.

    Raises:
        UserError: they are something else.
    """
    path = folder / CLAIMS
    claims = read_object(path) if path.exists() else {}
    for name, kind in KINDS.items():
        found = claims.get(name, [])
        if not isinstance(found, list) or not all(isinstance(part, kind) for part in found):
            raise UserError(
                f"Expected a list of {'names' if kind is str else 'objects'} for {name} in {path}, "
                f"got {ascii(found)[:60]}. Correct the file."
            )
    return claims


def checks(folder: Path, runs: Sequence[Path]) -> dict[str, Callable[[], Problems]]:
    """Name -> check of what a folder claims.

    Args:
        folder: of results.
        runs: its runs without the tries.

    Raises:
        UserError: the claims are malformed.
    """
    claims, home = read(folder), folder.resolve().parent
    return {
        "grids": lambda: check_grids(claims, folder, runs),
        "tables": lambda: check_tables(claims, folder),
        "numbers": lambda: _each(claims, "numbers", home, check_numbers),
        "curves": lambda: _each(claims, "curves", home, check_curves),
        "figures": lambda: check_figures(claims, folder),
    }


def not_made_again(folder: Path) -> str:
    """What `unchecked` names, counted, with its reasons; "" where that is nothing.

    Args:
        folder: of results.

    Raises:
        UserError: the claims are malformed.
    """
    return "; ".join(
        f"{_count(claim[kind], kind)} ({claim.get('why')})"
        for claim in read(folder).get("unchecked", ())
        for kind in ("figures", "tables")
        if claim.get(kind)
    )


def _count(found: Any, kind: str) -> str:
    number = len(found) if isinstance(found, list) else 1
    return f"{number} {kind if number != 1 else kind[:-1]}"


def _each(
    claims: Claim, kind: str, home: Path, check: Callable[[Claim, Path], Problems]
) -> Problems:
    for claim in claims.get(kind, ()):
        try:
            yield from check(claim, home)
        except (UserError, OSError, KeyError, TypeError, ValueError, ArithmeticError) as problem:
            yield f"{claim}: {problem}"


def _named(claims: Claim, kind: str, key: str) -> set[str]:
    """The files that claims of a kind name, one or a list each."""
    found = [claim.get(key) for claim in claims.get(kind, ())]
    names = [name for part in found for name in (part if isinstance(part, list) else [part])]
    return {name for name in names if isinstance(name, str)}


def _there(paths: Iterable[Path], home: Path) -> set[str]:
    return {path.relative_to(home).as_posix() for path in paths}


# ---- grids


def check_grids(claims: Claim, folder: Path, runs: Sequence[Path]) -> Problems:
    """What grids and runs differ in, and grids that no claim names."""
    home = folder.resolve().parent
    places = [run.resolve() for run in runs]
    yield from _each(claims, "grids", home, lambda claim, home: check_grid(claim, home, places))
    grids = _there(folder.resolve().rglob(GRID), home)
    for name in sorted(grids - _named(claims, "grids", "grid")):
        yield f"no claim says which runs {name} asks for"


def check_grid(claim: Claim, home: Path, runs: Sequence[Path]) -> Problems:
    """Every run of the grid must be there, with the config that the grid makes now; no other."""
    from d3po_bench.launch import grid as sweep
    from eval.tools import TOOLS

    below, grid = home / claim["runs"], claim["grid"]
    configs = sweep.configs(sweep.read(home / grid), TOOLS)
    asked: dict[tuple[str, ...], Any] = {
        (c.objective, c.method, f"seed-{c.seed}"): json.loads(c.to_json()) for c in configs
    }
    there = {run.relative_to(below).parts: run for run in runs if run.is_relative_to(below)}
    for place in sorted(asked.keys() - there.keys()):
        yield f"{grid} asks for {'/'.join(place)}, which is not in {claim['runs']}"
    for place in sorted(there.keys() - asked.keys()):
        yield f"{claim['runs']} holds {'/'.join(place)}, which {grid} does not ask for"
    for place in sorted(asked.keys() & there.keys()):
        found, made = read_config(there[place]), asked[place]
        other = sorted(k for k in found.keys() | made.keys() if found.get(k) != made.get(k))
        if other:
            yield f"{'/'.join(place)} has another {', '.join(other)} than {grid} makes"


# ---- tables

INTERVAL = re.compile(r"\d to [+-]?[\d.]+\)")


def check_tables(claims: Claim, folder: Path) -> Problems:
    """What documents and scripts differ in, and tables of numbers that no claim names.

    Without any claims the documents beside the folder need not be about it.
    """
    home = folder.resolve().parent
    heads: dict[str, set[str]] = {}
    yield from _each(claims, "tables", home, lambda claim, home: check_table(claim, home, heads))
    unchecked = _named(claims, "unchecked", "tables")
    paths = (path for name in DOCUMENTS for path in home.glob(name) if path.is_file())
    for name in sorted(_there(paths, home)) if (folder / CLAIMS).exists() else ():
        text = (home / name).read_text(encoding="utf-8", errors="replace").splitlines()
        for head in _tables_of_numbers(text):
            if head not in heads.get(name, set()) | unchecked:
                yield f"no claim says what prints the table of {name} below {head}"


def check_table(claim: Claim, home: Path, heads: dict[str, set[str]]) -> Problems:
    """Every line that the command prints must stand in the document; adds to its table heads."""
    command = [str(part) for part in claim["command"]]
    document = str(claim["document"])
    done = _python(command, home)
    if done.returncode:
        yield _failure(command, done)
        return
    text = (home / document).read_text(encoding="utf-8").splitlines()
    printed = Counter(line for line in done.stdout.splitlines() if line.strip())
    for line in printed - Counter(text):
        yield f"{document} lacks a line of `{' '.join(command)}`: {line}"
    own = {head for head, *_ in _tables(done.stdout.splitlines())}
    heads.setdefault(document, set()).update(own)
    there = Counter(line for table in _tables(text) if table[0] in own for line in table)
    for line in there - printed:
        how = "more often than rows support" if line in printed else "that no row supports"
        yield f"{document} has a line {how}: {line}"


def _python(command: Sequence[str], home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=home, capture_output=True, text=True, check=False
    )


def _failure(command: Sequence[str], done: subprocess.CompletedProcess[str]) -> str:
    return f"{' '.join(command)} fails: {done.stderr.strip().splitlines()[-1:]}"


def _tables(text: Sequence[str]) -> Iterator[list[str]]:
    """The lines of each Markdown table, its head first."""
    for number, (head, below) in enumerate(pairwise(text)):
        if head.startswith("|") and set(below) <= set("|-: ") and "|-" in below.replace(":", ""):
            yield list(_until_empty(text[number:]))


def _until_empty(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def _tables_of_numbers(text: Sequence[str]) -> Iterator[str]:
    """Heads of the tables with a column of numbers, set to the right, or with an interval."""
    for table in _tables(text):
        if "-:" in table[1] or any(INTERVAL.search(line) for line in table):
            yield table[0]


# ---- numbers in sentences

NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
"""Not that of a name, such as D3PO."""


def check_numbers(claim: Claim, home: Path) -> Problems:
    """A sentence must stand in the document, each of its numbers, rounded, in its cell."""
    document, sentence = claim["document"], claim["text"]
    if sentence not in " ".join((home / document).read_text(encoding="utf-8").split()):
        yield f"{document} does not say: {sentence}"
    numbers, cells = _numbers(sentence), claim["cells"]
    if len(numbers) != len(cells):
        yield f"Expected a cell for each of {len(numbers)} numbers, got {len(cells)}: {sentence}"
        return
    source = claim.get("table", document)
    text = (home / source).read_text(encoding="utf-8").splitlines()
    for number, (start, column) in zip(numbers, cells, strict=True):
        cell = _cell(text, start, column)
        if cell is None:
            yield f"{source} has no one cell {column!r} in a line that starts {start!r}"
        elif not any(_rounded(exact, number) for exact in _numbers(cell)):
            yield f"{document} says {number} where {source} has {cell!r}: {sentence}"


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text)]


def _rounded(exact: Decimal, number: Decimal) -> bool:
    """Whether a number is another one with no more digits than it shows."""
    exponent = number.as_tuple().exponent
    return isinstance(exponent, int) and abs(exact - number) <= Decimal(5).scaleb(exponent - 1)


def _cell(text: Sequence[str], start: str, column: str) -> str | None:
    """The cell below a column's name in the one line of that start; None if there are others."""
    found = [
        _cells(line)[_cells(table[0]).index(column)]
        for table in _tables(text)
        if column in _cells(table[0])
        for line in table
        if line.startswith(start)
    ]
    return found[0] if len(found) == 1 else None


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# ---- curves and figures


def check_curves(claim: Claim, home: Path) -> Problems:
    """The figure, drawn again from the rows, must have the same bytes, and its PNG look alike."""
    from eval.figures.curves import plot

    with tempfile.TemporaryDirectory() as place:
        plot([home / claim["runs"]], Path(place), x=claim["x"])
        for name in _both(claim["figure"]):
            if not _same(Path(place, f"curves{Path(name).suffix}"), home / name):
                yield f"{name} is not what `d3po-bench plot {claim['runs']}` draws"


def _both(figure: str) -> list[str]:
    """The names of a figure of curves as SVG and as PNG."""
    return [(Path(figure).parent / f"{Path(figure).stem}{kind}").as_posix()
            for kind in (".svg", ".png")]  # fmt: skip


def check_figures(claims: Claim, folder: Path) -> Problems:
    """Figures that scripts draw otherwise, and figures that no claim names."""
    home = folder.resolve().parent
    yield from _each(claims, "figures", home, check_drawn)
    yield from _each(claims, "unchecked", home, check_reason)
    curves = {name for figure in _named(claims, "curves", "figure") for name in _both(figure)}
    known = curves | _named(claims, "figures", "figures") | _named(claims, "unchecked", "figures")
    pictures = (p for p in folder.resolve().rglob("*") if p.suffix.lower() in PICTURES)
    for name in sorted(_there(pictures, home) - known):
        yield f"no claim says where {name} comes from"


def check_drawn(claim: Claim, home: Path) -> Problems:
    """The figures, drawn again by the command, must be the same."""
    command = [str(part) for part in claim["command"]]
    with tempfile.TemporaryDirectory() as place:
        done = _python([*command, place], home)
        if done.returncode:
            yield _failure(command, done)
            return
        for name in claim["figures"]:
            if not _same(Path(place, Path(name).name), home / name):
                yield f"{name} is not what `{' '.join(command)}` draws"


def check_reason(claim: Claim, home: Path) -> Problems:
    """A reason must be given, and figures that nothing is compared with be there."""
    if not isinstance(claim["why"], str) or not claim["why"].strip():
        yield f"no reason is given in {claim}"
    for name in claim.get("figures", ()):
        if not (home / name).is_file():
            yield f"{CLAIMS} names {name}, which is not there"


def _same(again: Path, figure: Path) -> bool:
    """Whether a figure that was drawn again is the published one: its bytes, or a PNG's looks."""
    if not again.is_file():
        return False
    if figure.suffix == ".png":
        return _alike(again, figure)
    return again.read_bytes() == figure.read_bytes()


def _alike(one: Path, other: Path) -> bool:
    """Whether pixels differ no more, and no more of them, than by another rounding of edges."""
    import numpy as np
    from PIL import Image

    with Image.open(one) as first, Image.open(other) as second:
        a, b = (np.asarray(image.convert("RGBA"), dtype=np.int16) for image in (first, second))
    if a.shape != b.shape:
        return False
    apart = np.abs(a - b).max(2)
    return int(apart.max()) <= MOST_APART and float((apart > 0).mean()) <= MOST_OTHERS
