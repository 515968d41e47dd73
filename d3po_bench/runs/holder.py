"""Who works in a run folder, and when that was last heard of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

BEAT = 20.0
"""Seconds after which a process that works in a folder says so again."""

DEAD = 180.0
"""Seconds of silence after which a process of another machine counts as dead."""

SIZE = 512
"""Bytes of a record, so that a new one is written over the old one in one piece."""


@dataclass(frozen=True)
class Holder:
    """A process that works in a folder."""

    host: str
    pid: int
    token: str
    """Tells it from an earlier process of that number."""
    time: float
    """Of its last sign of life, seconds since 1970."""

    @classmethod
    def here(cls) -> Holder:
        """This process, now."""
        return cls(socket.gethostname(), os.getpid(), uuid.uuid4().hex, time.time())

    @classmethod
    def read(cls, data: bytes) -> Holder | None:
        """From a record; None where it is none, as in the lock of an earlier version."""
        try:
            known = json.loads(data)
            return cls(str(known["host"]), int(known["pid"]), str(known["token"]),
                       float(known["time"]))  # fmt: skip
        except (ValueError, KeyError, TypeError, OverflowError):
            return None

    def record(self) -> bytes:
        """`SIZE` bytes of JSON, as of now."""
        return json.dumps(vars(replace(self, time=time.time()))).encode().ljust(SIZE)

    @property
    def near(self) -> bool:
        """Whether it is of this machine."""
        return self.host == socket.gethostname()

    @property
    def silent(self) -> float:
        """Seconds since its last sign of life."""
        return max(0.0, time.time() - self.time)

    @property
    def alive(self) -> bool:
        """Whether it may still work: not silent for long, nor gone from this machine."""
        return self.silent < DEAD and not (self.near and _gone(self.pid))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last heard of {self.silent:.0f} s ago"


def _gone(pid: int) -> bool:
    """Whether no process but this one has that number: a container restarts with the same."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


@contextlib.contextmanager
def beating(write: Callable[[], object]) -> Iterator[None]:
    """Call `write` every `BEAT` seconds, on a thread: a round may take hours.

    What it raises is left to the next beat; whoever works in the folder meets the fault, too.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(Exception):
                write()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
