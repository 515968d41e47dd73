"""SIGTERM and its like: finish the round, write it, and say "try again".

Schedulers send them before they end a job. A second one, as Ctrl-C, ends the work at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from d3po_bench.errors import TryAgainError
from d3po_bench.training.listeners import Evaluated, Listener

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

Row = dict[str, Any]

_asked: list[int] = []
"""Signals that came, since `heeding` began."""


def asked() -> int:
    """The first signal that asked this process to stop; 0 if none has."""
    return _asked[0] if _asked else 0


def ask(number: int, frame: FrameType | None = None) -> None:
    """Ask this process to stop after its round; the second time, at once."""
    if _asked:
        signal.default_int_handler(number, frame)
    wish(number)


def wish(number: int, frame: FrameType | None = None) -> None:
    """Ask this process to stop after its round, however often."""
    _asked.append(number)


@contextmanager
def heeding(*numbers: int) -> Iterator[None]:
    """Take these signals as a wish to stop; elsewhere than on the main thread, none comes."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in (numbers if here else ())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


class Stopping(Listener):
    """Ends a run after a round that was written, if it is asked to. Comes after all others."""

    def __init__(self, rounds: int) -> None:
        """`rounds` of the run: after the last one, it ends by itself."""
        self.rounds = rounds

    def evaluated(self, round_: int, found: Evaluated) -> None:
        """The base model's evaluation is kept as a round is."""
        if round_ == 0:
            self._stop(0)

    def round(self, metrics: Row, timing: Row) -> None:
        """A round has ended."""
        self._stop(metrics["round"])

    def _stop(self, round_: int) -> None:
        if asked() and round_ < self.rounds:
            raise stopped(f"after round {round_}")


def stopped(when: str) -> TryAgainError:
    """The error of a run that was asked to stop."""
    return TryAgainError(f"Stopped as asked, {when}. The same command resumes from there.")
