"""Weights of scorers, and prompt lists: what can be fetched, from where, and a local cache.

Each scorer's file declares its own in `WEIGHTS`; here they are only collected. Nothing is fetched
unasked: a scorer calls `find`, which names what is missing and the command that fetches it. Every
file is checked against its sha256 at each use.
"""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from d3po_bench.cache import home
from d3po_bench.digests import sha256_of
from d3po_bench.errors import RunError, UserError
from d3po_bench.prompts.fetched import LISTS

SCORERS = Path(__file__).parent / "scorers"

CHUNK = 1 << 16
"""Bytes that are written at once, and so the most that a broken download can lose."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files that are fetched and used together."""

    summary: str
    licence: str
    address: str
    """What comes before the name of each file in its URL."""
    files: dict[str, tuple[str, int]]
    """Name -> sha256 and size in bytes.

    The sha256, in hex, is empty where nobody has published one: then that of the first fetch is
    kept beside the file. A size that is not known is 0.
    """

    @property
    def size(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(size for _, size in self.files.values())

    def url(self, file: str) -> str:
        """Where one of the files is public."""
        return self.address + quote(file)


@cache
def known() -> dict[str, Weights]:
    """All that can be fetched, by name.

    The scorers' files are read but not imported: that would load torch, and take seconds.
    """
    found = dict(LISTS)
    for path in sorted(SCORERS.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id="WEIGHTS")], value=value):
                    found |= ast.literal_eval(value)
    return {name: Weights(**fields) for name, fields in found.items()}


def find(*names: str) -> list[Path]:
    """The files of these weights, checked, in the order in which they are declared.

    Raises:
        UserError: files are missing, all of which it names, or one is not what it should be.
        OSError: one cannot be read.
    """
    missing = {name: files for name in names if (files := _missing(name))}
    if missing:
        told = "; ".join(
            f"{', '.join(files)} in {home() / name} ({name}, {readable(known()[name].size)})"
            for name, files in missing.items()
        )
        raise UserError(
            f"Missing: {told}. Run `d3po-bench weights fetch {' '.join(missing)}` where there is "
            "a network, or copy there what `d3po-bench weights list` shows."
        )
    found = [(name, home() / name / file) for name in names for file in known()[name].files]
    for name, path in found:
        expected, actual = _expected(name, path), sha256_of(path)
        if actual != expected:
            raise UserError(
                f"{path} is damaged or another file: its sha256 is {actual} and should be "
                f"{expected}. Fetch it again: `d3po-bench weights fetch {name}`."
            )
    return [path for _, path in found]


def _missing(name: str) -> list[str]:
    return [file for file in known()[name].files if not (home() / name / file).is_file()]


def _expected(name: str, path: Path) -> str | None:
    """What a file's sha256 must be; None if nobody has published it and it was never fetched.

    Raises:
        UserError: the file is there, but nothing says what it should be.
    """
    published, note = known()[name].files[path.name][0], _note(path)
    if published or note.exists():
        return published or note.read_text(encoding="utf-8").strip()
    if path.exists():
        raise UserError(
            f"Nobody has published a sha256 for {path}. If you trust this file, write "
            f"{sha256_of(path)} to {note}; if not, remove it and run `d3po-bench weights fetch "
            f"{name}`."
        )
    return None


def _note(path: Path) -> Path:
    """Where the sha256 of a first fetch is kept."""
    return path.with_name(path.name + ".sha256")


def state(name: str) -> str:
    """What people are told of `name`: present, absent, or what is wrong with it."""
    if len(_missing(name)) == len(known()[name].files):
        return "absent"
    try:
        find(name)
    except (UserError, OSError) as problem:
        return str(problem)
    return "present"


def readable(size: int) -> str:
    """Bytes for people, such as 1.7 GB; 0 stands for a size that is not known."""
    if not size:
        return "size not known"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def fetch(name: str, retries: int = 2) -> Path:
    """Fetch what is missing or damaged of `name`; a download that broke off is resumed.

    Args:
        name: a key of `known`.
        retries: how often a download that fails is tried again.

    Returns:
        The folder that holds the files.

    Raises:
        UserError: there is no network, or what came is another file.
        RunError: the connection broke; what has come is kept.
    """
    import pooch

    folder = home() / name
    for file in known()[name].files:
        path, url = folder / file, known()[name].url(file)
        part = path.with_name(file + ".part")
        expected = _expected(name, path)
        store = pooch.create(
            folder, base_url="", registry={file: expected}, urls={file: url},
            retry_if_failed=retries,
        )  # fmt: skip
        try:
            store.fetch(file, downloader=partial(_resume, part))
        except ValueError as problem:  # pooch says which sha256 came, and has removed the file
            raise UserError(f"{url}: {problem}") from problem
        except OSError as problem:
            raise _broken(url, path, part, problem) from problem
        if expected is None:
            _note(path).write_text(sha256_of(path) + "\n", encoding="utf-8")
    return folder


def _resume(part: Path, url: str, target: str, store: Any) -> None:
    """Download `url` for pooch, which itself would start from nothing after every failure.

    Args:
        part: keeps what has come until all has.
        url: of the file.
        target: where pooch wants it.
        store: pooch's own, which has no part in it.
    """
    from pooch import HTTPDownloader

    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
        raise UserError(
            f"HF_HUB_OFFLINE is set, so {url} is not fetched. Unset it, or place that file in "
            f"{part.parent} by hand."
        )
    with part.open("ab") as file:

        def restart(answer: Any, **_: Any) -> None:
            """Without byte ranges the whole file comes (200); none lies past its end (416)."""
            if answer.status_code in (200, 416):
                file.truncate(0)

        HTTPDownloader(
            progressbar=sys.stderr.isatty(),
            chunk_size=CHUNK,
            headers={"Range": f"bytes={file.tell()}-", "Accept-Encoding": "identity"},
            hooks={"response": restart},
        )(url, file, store)
    part.replace(target)


def _broken(url: str, path: Path, part: Path, problem: BaseException) -> UserError:
    while problem.__context__:  # requests wraps what happened three times
        problem = problem.__context__
    reason = getattr(problem, "strerror", None) or problem
    if part.exists() and part.stat().st_size:
        return RunError(
            f"{url} broke off ({reason}). Run the command again: it resumes from {part}."
        )
    return UserError(
        f"{url} cannot be fetched ({reason}). Check the network, or place that file at {path} by "
        "hand."
    )
