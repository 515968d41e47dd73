"""Files that a kill never leaves half written, and a folder's lock."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError

from d3po_bench.errors import (
    OF_THE_DISK,
    PLACED_BY,
    InUseError,
    RunError,
    UserError,
    is_out_of_memory,
)
from d3po_bench.runs.holder import DEAD, SIZE, Holder, beating

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]

LOCK, FAILED = ".lock", ".failed"
"""Of a run: who works there, and why it ended early."""

SETTLED = 2.0
"""Seconds after which processes that take a folder over see what the others wrote."""


def write_atomically(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Write beside, fsync, rename: `path` holds the old bytes or the new ones, never a part.

    Args:
        path: what to write; its folder is made.
        data: the new bytes.
        keep: where the old file goes once the new one is whole; None to drop it.

    Raises:
        RunError: the disk is full or the folder cannot be written, naming the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # of a kill; or a link, behind which nothing is written
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                path.replace(keep)
            part.replace(path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, through a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as problem:
        if problem.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(number)


def write_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a folder beside, sync, rename: `folder` is whole or not there.

    Raises:
        UserError: as `write_atomically` does.
    """
    part = folder.with_name(folder.name + ".part")
    try:
        with writing(folder):
            remove(part)
            save(part)
            for path in (*part.rglob("*"), part):
                _sync(path)
            remove(folder)
            part.replace(folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one with nothing of what is behind it."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def write_error(path: Path, problem: Exception) -> UserError:
    """What to tell people about a file that could not be written."""
    number = getattr(problem, "errno", None)
    if "No space left" in str(problem):  # without a number, from safetensors
        number = errno.ENOSPC
    if number in OF_THE_DISK:
        return RunError(
            f"{path} cannot be written: {OF_THE_DISK[number]}. Fix that and run the same command "
            "again; a run resumes from its last checkpoint."
        )
    reason = getattr(problem, "strerror", None) or problem
    return UserError(
        f"{path} cannot be written: {reason}. Give another {PLACED_BY.get()} that can be written."
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the writing of `path` into our errors.

    Raises:
        UserError: as `write_atomically` does.
        OSError: there is no memory left, which is not the fault of the file.
    """
    try:
        yield
    except (OSError, SafetensorError) as problem:
        if is_out_of_memory(problem):
            raise
        raise write_error(path, problem) from problem


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """Rows as a table of all their columns; what a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = _Lines()
    # What is quoted depends on it: a lone \r, which ends lines too, would not be with \n.
    writer = csv.DictWriter(lines, names, lineterminator="\r\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return "".join(lines).encode()


class _Lines(list[str]):
    """The lines that a CSV writer writes, each with our end."""

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")


def write_output(path: Path, data: bytes) -> None:
    """Write a file that people named, in place of an earlier one of its kind alone.

    Of its kind is what begins with the same line. Anything else may be all that there is of it,
    such as a database of votes.

    Raises:
        UserError: something else is there, or as `write_atomically` does.
    """
    if path.is_file():
        with writing(path), path.open("rb") as file:
            first = file.readline(1000).strip()
        if first not in (data.partition(b"\n")[0].strip(), b"", b"[", b"[]"):
            raise UserError(
                f"{path} is there already and holds something else. Give another --out."
            )
    write_atomically(path, data)


def png_bytes(image: Tensor) -> bytes:
    """A picture [3, h, w] uint8 as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def json_lines(rows: Sequence[Row]) -> bytes:
    """Rows as one JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
"""What some mounts of Lustre and NFS say to flock."""


@dataclass(frozen=True)
class Hold:
    """A folder that this process alone works in."""

    folder: Path
    lock: IO[str]
    """Of a file in the folder."""
    everywhere: bool
    """Whether other machines are kept out, too."""
    holder: Holder
    """This process."""

    @property
    def there(self) -> bool:
        """Whether the folder is still in its place."""
        try:
            found = (self.folder / LOCK).stat()
        except OSError:
            return False
        return os.path.samestat(os.fstat(self.lock.fileno()), found)

    def require(self) -> None:
        """Refuse to work on in a folder that is no longer there, or is another.

        Raises:
            RunError: naming it, or the process that has taken it over.
        """
        if not self.there:
            raise RunError(
                f"{self.folder} was moved or removed while a command worked in it. Move it back "
                "and run the same command again: it resumes."
            )
        if now := self.other:
            raise RunError(
                f"{self.folder} was taken over by {now}, as nothing was heard of this process. "
                "Let that process finish."
            )

    @property
    def other(self) -> Holder | None:
        """Who has taken the folder over, if anybody has."""
        now = _holder(self.lock)
        return now if now and now.token != self.holder.token else None

    def beat(self) -> None:
        """Give a sign of life, unless another process has taken the folder over."""
        if not self.other:
            self.sign()

    def sign(self) -> None:
        """Say that this process works here."""
        os.pwrite(self.lock.fileno(), self.holder.record(), 0)


def _lock_file(path: Path) -> IO[str]:
    """Open a file to lock, making it if need be; never what a link names, and without waiting."""
    how = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK

    def opened(name: str, _: int) -> int:
        number = os.open(name, how, 0o666)
        if stat.S_ISREG(os.fstat(number).st_mode):
            return number
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file")

    return open(path, "w", opener=opened)


def _holder(file: IO[str]) -> Holder | None:
    """Who says in a lock file that it works there."""
    return Holder.read(os.pread(file.fileno(), SIZE, 0))


def _lock(file: IO[str]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _of_this_machine(folder: Path) -> Iterator[None]:
    """A lock where file systems have them, for a folder on one that has none."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    path = Path(tempfile.gettempdir(), f"d3po-bench-{os.getuid()}-{name}.lock")
    with _lock_file(path) as file:
        _lock(file)
        yield  # the file stays: removing it would free the name for a second lock


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[Hold]:
    """Hold the folder's lock, making the folder if need be and removing it if left empty.

    Where its file system has no locks, or each machine its own, a process of another machine
    counts as alive until it has given no sign of life for `DEAD` seconds. On this machine, the
    lock of a dead process is free at once.

    Raises:
        InUseError: another process holds it.
        UserError: it cannot be made.
        RunError: at the end, the folder was moved or removed meanwhile.
    """
    path = folder / LOCK
    try:
        fresh = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock_file(path)
    except (FileExistsError, NotADirectoryError) as problem:
        raise UserError(
            f"{folder} cannot be made: there is a file in its place. Give another "
            f"{PLACED_BY.get()}."
        ) from problem
    except OSError as problem:
        raise write_error(folder, problem) from problem
    with file, contextlib.ExitStack() as stack:
        hold = Hold(folder, file, _locked(folder, file, stack), Holder.here())
        if not hold.there:  # removed by its holder between the opening and the lock
            raise _busy(folder)
        before = _holder(file)
        if before and before.alive and not before.near:
            raise _busy(folder, before)
        try:
            with writing(path):
                hold.sign()
            if before and not before.near:
                time.sleep(SETTLED)  # two may take over a folder at once: the last one has it
                hold.require()
            stack.enter_context(beating(hold.beat))
            yield hold
            hold.require()
        finally:
            if hold.there and not hold.other:
                with contextlib.suppress(OSError):
                    path.unlink()
                    for place in fresh:
                        place.rmdir()


def _locked(folder: Path, file: IO[str], stack: contextlib.ExitStack) -> bool:
    """Lock a folder, by its file or else on this machine; whether for other machines, too."""
    try:
        try:
            _lock(file)
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                raise
            stack.enter_context(_of_this_machine(folder))
            return False
    except BlockingIOError as problem:
        raise _busy(folder, _holder(file)) from problem
    except OSError as problem:
        raise write_error(folder / LOCK, problem) from problem
    return True


def _busy(folder: Path, who: Holder | None = None) -> InUseError:
    named = f" ({who})" if who else ""
    wait = f" If it is dead, its folder is free {DEAD:.0f} s after its last sign of life." if (
        who and not who.near) else ""  # fmt: skip
    return InUseError(
        f"Another process is running in {folder}{named}. Wait for it, or give another "
        f"{PLACED_BY.get()}.{wait}"
    )


REMEDY = "Restore that file, leave that folder out, or run it again."


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around the reading of a file: whatever a malformed one raises becomes one line.

    Raises:
        UserError: naming the file.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would never end
            raise ValueError("it is no regular file")
        yield
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error,
    ) as problem:  # fmt: skip
        ours = type(problem) is ValueError
        detail = str(problem) if ours else f"{type(problem).__name__}: {problem}"
        raise UserError(f"{path} cannot be read: {detail[:200]}. {REMEDY}") from problem


def read_csv(path: Path) -> list[Row]:
    """Rows of text by column; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return []
    with readable(path), path.open(newline="", encoding="utf-8") as file:
        text = file.read()
        if "\0" in text:
            raise ValueError("it holds a null byte")
        return list(csv.DictReader(io.StringIO(text, newline="")))
