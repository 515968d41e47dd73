"""Progress of several runs, as bars or as lines for a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

import click
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from d3po_bench.training.progress import Progress, Report

MANY = 10
"""Runs that still get a bar each from the start."""


@contextlib.contextmanager
def bars(names: Mapping[str, str]) -> Iterator[Report]:
    """A bar for each run with the time left; without a terminal, a line now and then.

    Of many runs only those at work have a bar, below one for all.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, names)
        return
    columns = (TextColumn("{task.fields[name]}"), BarColumn(20), TaskProgressColumn(),
               TimeRemainingColumn(), TextColumn("{task.description}"))  # fmt: skip
    many = len(names) > MANY
    with rich_progress.Progress(*columns, console=console) as bars:
        whole = bars.add_task("", total=len(names), name="all runs", visible=many)
        tasks = {
            run: bars.add_task("waiting", total=1.0, name=name, start=False, visible=not many)
            for run, name in names.items()
        }
        done = dict.fromkeys(names, 0.0)

        def show(p: Progress) -> None:
            task, done[p.run] = tasks[p.run], p.done
            if p.text and not bars.tasks[task].started:
                bars.start_task(task)
            visible = not many or p.done < 1
            bars.update(task, completed=p.done, description=p.text, visible=visible)
            bars.update(whole, completed=sum(done.values()))

        yield show


@contextlib.contextmanager
def silent() -> Iterator[Report]:
    """For a process beside the one that shows it."""
    yield lambda progress: None


def noting(report: Report) -> Report:
    """Print each note once, above the bars; pass all else on."""
    said: set[str] = set()

    def told(progress: Progress) -> None:
        if not progress.note:
            report(progress)
        elif progress.note not in said:
            said.add(progress.note)
            click.echo(f"note: {progress.note}", err=True)

    return told


class _Lines:
    """Progress for logs: a line each time a run has done another tenth."""

    def __init__(self, console: Console, names: Mapping[str, str]) -> None:
        self.console, self.names = console, names
        self.last: dict[str, int] = {}
        self.began: dict[str, tuple[float, float]] = {}

    def __call__(self, progress: Progress) -> None:
        """Print the line, if it is time."""
        tenth = int(progress.done * 10)
        if self.last.get(progress.run) != tenth:
            self.last[progress.run] = tenth
            text = f"{self.names[progress.run]}  {progress.done:4.0%}  {progress.text}"
            self.console.print(text + self._left(progress), highlight=False, soft_wrap=True)

    def _left(self, progress: Progress) -> str:
        """The time left, once there is something to tell it from."""
        now, done = time.monotonic(), progress.done
        start, before = self.began.setdefault(progress.run, (now, done))
        if not before < done < 1:
            return ""
        seconds = (now - start) * (1 - done) / (done - before)
        return f"  {timedelta(seconds=round(seconds))} left"
