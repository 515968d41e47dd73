"""Prompts: lists that ship with the package, and files of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from unicodedata import category

from d3po_bench.digests import short
from d3po_bench.errors import UserError
from d3po_bench.prompts.tables import SUFFIXES, read_text, texts_of

HOME = Path(__file__).parent


def names() -> list[str]:
    """The lists that ship with the package."""
    return sorted(path.stem for path in HOME.glob("*.txt"))


def read_prompts(source: str) -> list[str]:
    """The prompts of a shipped list or of a file.

    A .txt file has one on each line, blank lines aside. A .csv, .tsv, .json or .jsonl file has
    them in a field that is called prompt, text or caption, or that `source` names after a colon:
    captions.csv:title. Line breaks within a prompt become spaces.

    Raises:
        UserError: no such list or file, it is empty, malformed or of another kind, or a prompt
            holds control characters.
    """
    path, field = _place_of(source)
    try:
        prompts = texts_of(path, field) if _is_table(path) else _lines(path)
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = getattr(problem, "strerror", None) or problem
        near = get_close_matches(source, names(), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"No prompt list is called {source[:200]!r}, and no such file can be read: {reason}. "
            f"{hint}Give {', '.join(names())}, or a file with one prompt on each line."
        ) from problem
    prompts = [re.sub("\r\n?|\n", " ", prompt.strip()) for prompt in prompts]
    require_text("\n".join(prompts), path)
    if not prompts:
        raise UserError(f"{path} holds no prompt. Write one on each line.")
    return prompts


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _place_of(source: str) -> tuple[Path, str]:
    """The file, and the field of it that is named after a colon."""
    if source in names():
        return HOME / f"{source}.txt", ""
    named = re.fullmatch(r"(.+?\.(?:csv|tsv|jsonl?)):(.+)", source, re.IGNORECASE)
    return (Path(named[1]), named[2]) if named else (Path(source), "")


def _lines(path: Path) -> list[str]:
    if path.suffix.lower() not in ("", ".txt"):
        raise UserError(
            f"{path} is no file of prompts that is known here. Give .txt with one on each line, "
            f"or {', '.join(SUFFIXES)}; rename or convert it."
        )
    text = read_text(path)
    require_text(text, path)
    found = [line for line in map(str.strip, text.split("\n")) if line]
    if _is_json(text) or (found and _is_json(found[0])):
        raise UserError(
            f"{path} holds JSON, not a prompt on each line. Call it .json, or .jsonl if each line "
            "is an object."
        )
    return found


def _is_json(text: str) -> bool:
    """Whether it is a list or an object, which no prompt is."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def control_in(text: str) -> str | None:
    """The first control character, or half of a character; tabs and ends of lines are none."""
    return next((c for c in text if category(c) in ("Cc", "Cs") and c not in "\t\n\r"), None)


def require_text(text: str, path: Path) -> None:
    """Refuse control characters: a prompt with one is another than it seems.

    Raises:
        UserError: naming the character and its place.
    """
    strange = control_in(text)
    if strange is not None:
        place = ascii(text[max(0, text.index(strange) - 20) :][:40])
        raise UserError(f"{path} holds the control character {strange!a} in {place}. Remove it.")


def digest(prompts: Sequence[str]) -> str:
    """Twelve hex digits that name a list of prompts."""
    return short("\n".join(prompts))
