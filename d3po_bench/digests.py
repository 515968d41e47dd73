"""Checksums: of files, and short ones that name a text."""

from __future__ import annotations

import hashlib
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


def short(text: str) -> str:
    """Twelve hex digits that name a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
