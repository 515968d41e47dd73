"""Many run folders as one file, `runs.tar.xz`: five text files a run are too many for git.

What finds runs finds those in such a file, too, as if their folders stood beside it: they are
unpacked, once for each process, into a folder that is gone when it ends.
"""

from __future__ import annotations

import atexit
import io
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from d3po_bench.errors import UserError
from d3po_bench.runs.files import readable, write_atomically

PACKED = "runs.tar.xz"
"""Its name, in the folder in which its runs would stand."""

LARGEST, MEMORY = 2**29, 2**28
"""Bytes that an archive may unpack to, several times a comparison of 500 runs, and that its
decoder may take."""

_beside: dict[Path, Path] = {}
"""Folder that an archive was unpacked into -> the one that it lies in."""


def pack(archive: Path, files: Mapping[str, Path]) -> None:
    """Write files as an archive; the same files give the same bytes.

    Args:
        archive: to write, whole or not at all.
        files: name in the archive -> the file.

    Raises:
        UserError: a file cannot be read, or the archive cannot be written.
    """
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, path in sorted(files.items()):
            with readable(path):
                content = path.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)  # time, owner and mode are the same for every file
            tar.addfile(entry, io.BytesIO(content))
    write_atomically(archive, data.getvalue())


def unpacked(archive: Path) -> Path:
    """A folder with what is in an archive, for as long as this process lives.

    Raises:
        UserError: it is damaged, too large, or holds something else than files below it.
    """
    facts = archive.stat()
    return _unpacked(archive, facts.st_size, facts.st_mtime_ns)


@cache
def _unpacked(archive: Path, size: int, changed: int) -> Path:
    place = Path(tempfile.mkdtemp(prefix="d3po-bench-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    # Named as the archive, since errors name the files in it.
    folder = place / archive.parent.name / archive.name
    try:
        data = io.BytesIO(_decoded(archive.read_bytes()))
        with tarfile.open(fileobj=data, mode="r:") as tar:
            if odd := [e.name for e in tar if not (e.isfile() or e.isdir())]:
                raise ValueError(f"{odd[0][:80]!r} is no file")
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, OSError, ValueError, RecursionError) as problem:
        raise UserError(
            f"{archive} cannot be unpacked: {str(problem)[:200]}. Restore that file, or leave its "
            "folder out."
        ) from problem
    _beside[folder] = archive.parent
    return folder


def _decoded(data: bytes) -> bytes:
    """What was compressed, whole.

    Raises:
        LZMAError: that is no such data, or needs too much memory.
        ValueError: there is too much of it, or too little.
    """
    decoder = lzma.LZMADecompressor(memlimit=MEMORY)
    found = decoder.decompress(data, max_length=LARGEST)
    if not decoder.eof:
        raise ValueError(f"it is cut short, or holds more than {LARGEST:,} bytes")
    return found


def packed_at(path: Path) -> Path | None:
    """What would stand at a path if the nearest archive above it were unpacked in its place.

    Returns:
        A folder, which need not exist; None where there is no archive.

    Raises:
        UserError: it is damaged.
    """
    home = next((p for p in path.parents if (p / PACKED).is_file()), None)
    return unpacked(home / PACKED) / path.relative_to(home) if home else None


def place_of(folder: Path) -> Path:
    """Where a run's folder would stand if the archive that it was unpacked from were one."""
    for parent in folder.parents:
        if parent in _beside:
            return _beside[parent] / folder.relative_to(parent)
    return folder
