"""Connections that ask for nothing cannot keep others out."""

from __future__ import annotations

import asyncio
import resource
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 20.0
"""For a request to come whole; the largest form is 16 KiB."""


def limits() -> tuple[int, int]:
    """Connections at a time, and in the queue before them: fewer than this process may open."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = 4096 if files == resource.RLIM_INFINITY else files
    return min(1024, files // 2), min(128, files // 8)


class Connection(H11Protocol):
    """uvicorn's, which by itself waits without end for a request that was begun.

    Whoever has not sent a whole request in time is cut off. So is the oldest of them as soon as
    there are too many: 300 half-sent requests would take all files that a process may open.
    """

    most: ClassVar[int] = limits()[0]
    waiting: ClassVar[dict[Connection, None]] = {}
    """All without a whole request, the oldest first."""
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.most:
            next(iter(self.waiting))._cut_off()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request, or all of it."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        """Set the time by which the request must be here, unless it is."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(SECONDS, self._cut_off)
            self.waiting[self] = None

    def _cut_off(self) -> None:
        self._stop()
        self.transport.abort()

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
            self.waiting.pop(self)
