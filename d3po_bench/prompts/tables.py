"""Tables of texts as data sets have them: .csv, .tsv, .json and .jsonl."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from d3po_bench.errors import UserError

FIELDS = ("prompt", "text", "caption")
"""Fields that hold a text, whatever their capitals."""

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


def read_text(path: Path) -> str:
    """What is in a UTF-8 file, without the mark that Windows editors put first.

    Raises:
        UserError: it is no UTF-8 text, or a pipe or device.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device, which is read once. Give a file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(
            f"{path} is not UTF-8 text (byte {problem.object[problem.start]:#04x} at position "
            f"{problem.start}). Save the file as UTF-8."
        ) from problem


def rows_of(path: Path) -> list[Any]:
    """The rows of a table: a dictionary each, or what else a JSON file lists.

    Raises:
        UserError: it is malformed, or a row of a CSV file has more or fewer values than columns.
        OSError: it cannot be read.
    """
    kind, text = path.suffix.lower(), read_text(path)
    try:
        if kind == ".jsonl":
            return [_json(line) for line in text.split("\n") if line.strip()]
        if kind == ".json":
            found = _json(text)
            if not isinstance(found, list):
                raise ValueError(f"it holds one {type(found).__name__}, not a list")
            return found
        return _separated(text, "\t" if kind == ".tsv" else ",")
    except (ValueError, RecursionError, csv.Error) as problem:
        raise UserError(
            f"{path} cannot be read as {kind[1:].upper()}: {problem}. Correct it; a text with "
            "commas needs quotes in CSV, and an object on each line is .jsonl."
        ) from problem


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two fields of an object have the same name")
    return found


def _separated(text: str, delimiter: str) -> list[dict[str, str]]:
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = list(lines.fieldnames or ())
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    rows = []
    for number, row in enumerate(lines, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has more or fewer values than the header has columns")
        rows.append(row)
    return rows


def texts_of(path: Path, field: str) -> list[str]:
    """The texts of a table.

    Args:
        path: of the table; JSON may list texts instead of objects.
        field: which field holds them; empty for the one that is called prompt, text or caption.

    Raises:
        UserError: there is no such field, there are several, or a row has no text there.
        OSError: it cannot be read.
    """
    rows = rows_of(path)
    plain = all(isinstance(row, str) for row in rows) and not field
    if rows and not plain:
        field = field_of(path, rows[0], field)
    texts: list[str] = []
    for number, row in enumerate(rows, 1):
        text = row if plain else row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{path} has {ascii(text)[:40]} instead of a text in row {number}"
                f"{f' as {field}' if field else ''}. Complete or remove that row."
            )
        texts.append(text)
    return texts


def field_of(path: Path, row: Any, wanted: str) -> str:
    """The name of the field that holds the texts, from a table's first row."""
    names = [name for name in row if isinstance(name, str)] if isinstance(row, dict) else []
    found = [n for n in names if (n == wanted if wanted else n.strip().lower() in FIELDS)]
    if len(found) == 1:
        return found[0]
    fault = f"has {' and '.join(found)}" if found else f"has no {wanted or ' or '.join(FIELDS)}"
    there = f" but {', '.join(names)[:200]}" if names and not found else ""
    raise UserError(f"{path} {fault}{there}. Say which field holds the prompts: {path}:FIELD.")
