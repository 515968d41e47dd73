"""What a command shows of its work: one line for all of it, with the time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from enum import IntEnum
from typing import Self

import click
from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from d3po_bench.errors import leads
from d3po_bench.launch.estimate import Estimate, Standing
from d3po_bench.training.progress import START, Progress

SOON, LATE = 10.0, 300.0
"""Seconds between two lines of a log: at least, and at most while something happens."""


class Level(IntEnum):
    """How much a command says beside its result."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class Board:
    """Progress of a command, on stderr: `with board:` around the work.

    On a terminal, a bar for the whole command and one for each run at work. Elsewhere a line now
    and then.
    """

    def __init__(self, level: Level = Level.NORMAL, console: Console | None = None) -> None:
        """`level`: how much the first rank says; `console`: where, in place of stderr."""
        self.level, self.estimate = level if leads() else Level.QUIET, Estimate()
        self.console = console or Console(stderr=True)
        self.began = time.monotonic()
        self.said: set[str] = set()
        self.view: _Bars | _Lines | None = None

    def __enter__(self) -> Self:
        """Begin to show."""
        self.began = time.monotonic()
        if self.level > Level.QUIET:
            self.view = _Bars(self) if self.console.is_terminal else _Lines(self)
        return self

    def __exit__(self, problem: object, *_: object) -> None:
        """Stop, and say how long it took if all went well."""
        if isinstance(self.view, _Bars):
            self.view.bars.stop()
        if self.view and self.estimate.work and problem is None:
            self.say(f"done in {self.elapsed}")
        self.view = None

    @property
    def elapsed(self) -> str:
        """Since the beginning, h:mm:ss."""
        return _clock(time.monotonic() - self.began)

    def expect(self, work: Iterable[Progress], workers: int = 1) -> None:
        """So much is to be done, after what was expected before.

        Args:
            work: as it is before its beginning.
            workers: how much of it is done at a time.
        """
        self.estimate.expect(work, workers)

    def report(self, progress: Progress) -> None:
        """Something has gone on."""
        if progress.note:
            self.note(progress.note)
            return
        if progress.run not in self.estimate.work:
            self.expect([progress])
        self.estimate.work[progress.run] = progress
        if progress.detail and self.level == Level.VERBOSE:
            self.say(f"[{self.elapsed}] {progress.run}: {progress.detail}")
        if self.view is not None:
            self.view.show(progress)

    def failed(self, run: str) -> None:
        """Nothing more comes of a run; why is told elsewhere."""
        self.estimate.work[run] = replace(self.estimate.work[run], left={})
        if isinstance(self.view, _Bars):
            self.view.show(self.estimate.work[run])

    def note(self, text: str) -> None:
        """Tell people once, however often it is said."""
        if text not in self.said:
            self.said.add(text)
            self.say(f"note: {text}")

    def say(self, text: str) -> None:
        """Tell people, if they want to be told."""
        if self.level > Level.QUIET:
            click.echo(text, err=True)

    def summary(self) -> str:
        """How many runs are done, and what those of one kind have gained so far."""
        work = [p for p in self.estimate.work.values() if p.like]
        parts = []
        if len(work) > 1:
            parts.append(f"{sum(p.finished for p in work)} of {len(work)} runs done")
        gains = [p.gain for p in work if p.gain is not None]
        if len(work) > 1 and gains and len({p.like for p in work}) == 1:
            unit = next(p.unit for p in work if p.unit)
            mean = sum(gains) / len(gains)
            parts.append(f"held-out gain {mean:+.3f} {unit} (mean of {len(gains)})")
        return ", ".join(parts)


class _Lines:
    """For a log: a line when another tenth is done, or after a while, but not one after another."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.last, self.tenth = board.began, -1

    def show(self, progress: Progress) -> None:
        """Print the line, if it is time."""
        now, board = time.monotonic(), self.board
        begun = any(progress.done.values()) and not progress.left.get(START)
        early = self.tenth < 0 and begun  # before that it may be refused, in one line
        if now - self.last < SOON and not early:
            return
        whole = board.estimate.whole()
        tenth = int((whole.share or 0) * 10)
        if tenth != self.tenth or now - self.last >= LATE:
            self.last, self.tenth = now, tenth
            place = f"{progress.run}: {progress.text}"
            said = "; ".join(filter(None, [_standing(whole), board.summary(), place]))
            board.say(f"[{board.elapsed}] {said}")


class _Bars:
    """For a terminal: a bar for the command, and below it one for each run at work."""

    def __init__(self, board: Board) -> None:
        self.board = board
        columns = (
            TextColumn("{task.fields[name]}"), BarColumn(20), TextColumn("{task.fields[percent]}"),
            _Left(), TextColumn("{task.description}"),
        )  # fmt: skip
        self.bars = bars.Progress(*columns, console=board.console, transient=True)
        self.bars.start()
        self.whole = self.bars.add_task("", name="all", percent="", until=None)
        self.tasks: dict[str, TaskID] = {}

    def show(self, progress: Progress) -> None:
        """Bring the bars up to date."""
        estimate, run = self.board.estimate, progress.run
        if progress.finished:
            with contextlib.suppress(KeyError):
                self.bars.remove_task(self.tasks.pop(run))
        else:
            if run not in self.tasks:
                self.tasks[run] = self.bars.add_task("", name=run, percent="", until=None)
            self._update(self.tasks[run], estimate.of(run), progress.text)
        self._update(self.whole, estimate.whole(), self.board.summary())

    def _update(self, task: TaskID, standing: Standing, text: str) -> None:
        until = None if standing.left is None else time.monotonic() + standing.left
        total = None if standing.share is None else 1.0  # None: the bar moves, but tells nothing
        self.bars.update(
            task, completed=standing.share or 0.0, total=total, percent=_percent(standing),
            until=until, description=text,
        )  # fmt: skip


class _Left(ProgressColumn):
    """The time left, counted down while nothing is heard."""

    def render(self, task: Task) -> Text:
        """As h:mm:ss."""
        until = task.fields["until"]
        return Text("" if until is None else f"{_clock(until - time.monotonic())} left")


def _standing(standing: Standing) -> str:
    left = None if standing.left is None else f"{_clock(standing.left)} left"
    return ", ".join(filter(None, [_percent(standing), left]))


def _percent(standing: Standing) -> str:
    """Never 100 %: something always follows, if only the writing of results."""
    return "" if standing.share is None else f"{min(99, int(standing.share * 100))} %"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
