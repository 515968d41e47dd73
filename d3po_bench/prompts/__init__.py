"""Prompts: lists in plain text, one a line, and folders of pictures with the text of each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from unicodedata import category

from d3po_bench.digests import short
from d3po_bench.errors import UserError

HOME = Path(__file__).parent


def names() -> list[str]:
    """The lists that ship with the package."""
    return sorted(path.stem for path in HOME.glob("*.txt"))


def read_prompts(source: str) -> list[str]:
    """The prompts of a shipped list or of a file, without blank lines.

    Raises:
        UserError: no such list or file, or it is empty, not UTF-8 text, or a line of it holds
            control characters.
    """
    path = HOME / f"{source}.txt" if source in names() else Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors write a byte-order mark
    except UnicodeDecodeError as problem:
        raise UserError(
            f"{path} is not UTF-8 text (byte {problem.object[problem.start]:#04x} at position "
            f"{problem.start}). Save the file as UTF-8."
        ) from problem
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(
            f"No prompt list is called {source[:200]!r}, and no such file can be read: {reason}. "
            f"Give {', '.join(names())}, or a file with one prompt on each line."
        ) from problem
    _require_text(text, path)
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt. Write one on each line.")
    return prompts


def read_pictures(folder: Path) -> list[tuple[str, str]]:
    """File names and texts of a folder of pictures, from the lines of its metadata.csv.

    The layout of Hugging Face's image folders: columns file_name and text (or prompt).

    Raises:
        UserError: the file is malformed, or a line names no picture inside the folder or no text.
    """
    path = folder / "metadata.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            column = "text" if "text" in (lines.fieldnames or ()) else "prompt"
            named = [(line["file_name"] or "", line[column] or "") for line in lines]
    except (OSError, KeyError, ValueError, csv.Error) as problem:
        raise UserError(
            f"{path} cannot be read as a table with columns file_name and text: {problem!r}. Write "
            "a header and a line for each picture."
        ) from problem
    for name, text in named:
        _require_inside(folder, name)
        _require_text(text, path)
        if not text.strip():
            raise UserError(f"{path} has no text for {name!a}. Complete that line.")
    if not named:
        raise UserError(f"{path} names no picture. Write a line for each.")
    return named


def _require_inside(folder: Path, name: str) -> None:
    place = (folder / name).resolve() if "\0" not in name else folder
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise UserError(
            f"The metadata.csv of {folder} names {name!a}, which is not a picture inside that "
            "folder. Correct that line."
        )


def _require_text(text: str, path: Path) -> None:
    """Refuse control characters: a prompt with one is another than it seems."""
    strange = next((c for c in text if category(c) == "Cc" and c not in "\t\n\r"), None)
    if strange is not None:
        place = ascii(text[max(0, text.index(strange) - 20) :][:40])
        raise UserError(f"{path} holds the control character {strange!a} in {place}. Remove it.")


def digest(prompts: Sequence[str]) -> str:
    """Twelve hex digits that name a list of prompts."""
    return short("\n".join(prompts))
