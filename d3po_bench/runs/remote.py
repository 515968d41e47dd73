"""Run folders in object storage, such as s3://bucket/runs: worked on in a folder of this machine.

The folder of an address lies in the cache, and says which address it is of: what writes a run
there (`runs.store`) uploads it after each checkpoint, and resumes from what is there. What only
reads gets a copy of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d3po_bench.cache import home
from d3po_bench.errors import InUseError, RunError, UserError, install
from d3po_bench.runs.files import LOCK, write_atomically
from d3po_bench.runs.holder import DEAD, Holder, beating

SETTLED = 2.0
"""Seconds after which two that begin at once see each other's lock."""

INDEX = ".index.json"
"""Of a copy: which version of each file it has."""

BUCKETS = ("s3", "gs", "az", "abfs")
"""Schemes that obstore speaks; others are left to the packages that fsspec knows."""

OWN = (LOCK, INDEX, "checkpoints/previous.safetensors")
"""Files that stay on the machine: an upload needs no earlier checkpoint, as it comes whole."""


def is_address(text: str) -> bool:
    """Whether a text is the address of a folder elsewhere."""
    return "://" in text


def workplace(address: str) -> Path:
    """The folder of this machine in which runs of an address are worked on."""
    return _below("work", address)


def _below(use: str, address: str) -> Path:
    scheme, _, path = address.partition("://")
    return home() / use / scheme / path.strip("/")


def address_of(folder: Path) -> str | None:
    """What a folder of this machine is the workplace of; None for any other folder."""
    try:
        scheme, *rest = folder.absolute().relative_to((home() / "work").absolute()).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(rest)}"


def copy(address: str) -> Path:
    """A copy of all run files below an address but checkpoints, brought up to date.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    store = Mirror(address, _below("read", address))
    if not store.pull(skip="checkpoints"):
        raise UserError(f"There is nothing in {address}. Correct the address.")
    return store.folder


def seen(folder: Path) -> Path:
    """A folder to read the run from, whose own one may be the workplace of an address."""
    address = address_of(folder)
    if address is None:
        return folder
    store = Mirror(address, _below("read", address))
    store.pull(skip="checkpoints")
    return store.folder


class Mirror:
    """A folder of this machine, and the address that it is a copy of."""

    def __init__(self, address: str, folder: Path) -> None:
        """Nothing is read or written yet.

        Raises:
            UserError: there is nothing that speaks to such addresses.
        """
        import fsspec

        self.address, self.folder = address.rstrip("/"), folder
        self.known: dict[str, Any] = {}
        """What there is at the address, in the version that is here."""
        with self._talking():
            if (scheme := self.address.partition("://")[0]) in BUCKETS:
                from obstore.fsspec import register

                register(scheme)
            self.files, self.root = fsspec.core.url_to_fs(self.address)

    @classmethod
    def of(cls, folder: Path) -> Mirror | None:
        """The one of a workplace; None for any other folder."""
        address = address_of(folder)
        return cls(address, folder) if address else None

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Around what any backend may raise: it becomes one line."""
        try:
            yield
        except ImportError as problem:
            raise UserError(
                f"{self.address} needs a package that is not there: {problem}. For s3://, gs:// "
                f"and az://: {install('storage')}."
            ) from problem
        except UserError:
            raise
        except Exception as problem:
            said = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise RunError(
                f"{self.address} cannot be read or written: {said}. Correct the address, its "
                "permissions or the connection, and run the same command again: it resumes."
            ) from problem

    # ---- files

    def _there(self) -> dict[str, str]:
        """File -> what names its version."""
        self.files.invalidate_cache()
        infos = self.files.find(self.root, detail=True)
        return {
            path[len(self.root) :].lstrip("/"): hashlib.sha256(str(info).encode()).hexdigest()
            for path, info in infos.items()
        }

    def pull(self, skip: str = LOCK) -> bool:
        """Make the folder what is at the address; whether anything is.

        Args:
            skip: file or folder that stays as it is here; by default this machine's lock.

        Raises:
            UserError: it cannot be read.
        """
        index = self.folder / INDEX
        had = json.loads(index.read_text()) if index.exists() else {}
        with self._talking():
            there = {n: key for n, key in self._there().items() if skip not in Path(n).parts}
            index.unlink(missing_ok=True)  # while files are between two versions
            for name, key in there.items():
                if had.get(name) != key or not (self.folder / name).exists():
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    self.files.get_file(f"{self.root}/{name}", str(self.folder / name))
        for path in [*self.folder.rglob("*")]:
            name = str(path.relative_to(self.folder))
            if path.is_file() and name not in there and skip not in path.parts and name != INDEX:
                path.unlink()
        if there:
            write_atomically(index, json.dumps(there).encode())
        self.known = {name: self._version(name) for name in there}
        return bool(there)

    def _version(self, name: str) -> tuple[int, int] | None:
        try:
            found = (self.folder / name).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def push(self) -> None:
        """Upload what has changed, so that a kill on the way leaves a run that resumes.

        Rows come before the checkpoint, which may lack the last of them but not know other ones;
        what says that there is a checkpoint, or that the run has ended, comes last.

        Raises:
            RunError: it cannot be written, or another process has taken the run over.
        """
        self._require()
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        names = {str(path.relative_to(self.folder)) for path in paths} - {*OWN}
        late = ("checkpoints/", "lora/", "provenance.json")
        order = sorted(
            (name for name in names if not name.endswith(".part")),
            key=lambda name: next((n for n, part in enumerate(late) if name.startswith(part)), -1),
        )
        with self._talking():
            for name in order:
                version = self._version(name)
                if self.known.get(name) != version:
                    self.files.put_file(str(self.folder / name), f"{self.root}/{name}")
                    self.known[name] = version
            for name in self.known.keys() - names - {LOCK}:
                self.files.rm_file(f"{self.root}/{name}")
                del self.known[name]
        (self.folder / INDEX).unlink(missing_ok=True)

    # ---- the lock

    def _holder(self) -> Holder | None:
        try:
            return Holder.read(self.files.cat_file(f"{self.root}/{LOCK}"))
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other machines out, as far as an object that each of them may write can.

        Raises:
            InUseError: another process works there.
            RunError: it cannot be read or written.
        """
        mine = Holder.here()

        def sign() -> None:
            if (now := self._holder()) is None or now.token == mine.token:
                self.files.pipe_file(f"{self.root}/{LOCK}", mine.record())

        with self._talking():
            before = self._holder()
            if before and before.alive:
                raise self._busy(before)
            self.files.pipe_file(f"{self.root}/{LOCK}", mine.record())
            time.sleep(SETTLED)
            if (now := self._holder()) and now.token != mine.token:
                raise self._busy(now)
        self.mine = mine
        try:
            with beating(sign):
                yield
        finally:
            with contextlib.suppress(Exception):  # then it counts as dead after a while
                if (now := self._holder()) and now.token == mine.token:
                    self.files.rm_file(f"{self.root}/{LOCK}")

    def _busy(self, who: Holder) -> InUseError:
        return InUseError(
            f"Another process is running in {self.address} ({who}). Wait for it, or give another "
            f"--out. If it is dead, its folder is free {DEAD:.0f} s after its last sign of life."
        )

    def _require(self) -> None:
        """Refuse to write where another process has taken over."""
        with self._talking():
            now = self._holder()
        if now and now.token != self.mine.token:
            raise RunError(
                f"{self.address} was taken over by {now}, as nothing was heard of this process. "
                "Let that process finish."
            )
