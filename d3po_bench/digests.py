"""Checksums: of files, and short ones that name a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex; read once while its size and time stay: a grid asks for each run.

    Raises:
        OSError: it cannot be read.
    """
    facts = path.stat()
    return _sha256(path, facts.st_size, facts.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(folder: Path, known: Mapping[str, str]) -> list[str]:
    """The files that are missing or are not those on record, in its order.

    Args:
        folder: the files'.
        known: their paths in it -> the sha256 that was recorded of each.

    Raises:
        OSError: one cannot be read.
    """
    paths = {name: folder / name for name in known}
    return [n for n, p in paths.items() if not p.is_file() or sha256_of(p) != known[n]]


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below a folder, also behind links to folders, in order; none where there is none.

    Args:
        folder: to look in.
        above: the folders that it is in: a link to one of them has been looked at.
    """
    here = folder.resolve()
    if here in above or not here.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_below(path, (*above, here))
        elif path.is_file():
            yield path


def short(text: str) -> str:
    """Twelve hex digits that name a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
