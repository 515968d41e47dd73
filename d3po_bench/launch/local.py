"""Runs side by side in worker processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from d3po_bench.errors import RunError
from d3po_bench.launch.job import SMALLER, End, make_run
from d3po_bench.training.progress import Progress, Report
from d3po_bench.training.run import Job


class _Worker:
    """A process that makes one run after the other, and what it is at.

    Each has a pipe of its own: a queue that several share can stay locked when one is killed,
    and does not tell whose run that was.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.give(job)

    def give(self, job: Job) -> None:
        """Let it make that run."""
        self.job = job
        with contextlib.suppress(OSError):  # it has died, and `end` will say so
            self.pipe.send(job)

    def end(self, report: Report) -> End | None:
        """Pass on the progress that has come; how the run ended, if it has."""
        while (said := self._said()) is not None:
            if isinstance(said, End):
                return said
            report(said)
        return None

    def _said(self) -> Progress | End | None:
        alive = self.process.is_alive()  # asked first: what it said before it died is in the pipe
        try:
            if self.pipe.poll():
                said: Progress | End = self.pipe.recv()
                return said
        except (EOFError, OSError):
            self.process.join()
            alive = False
        return None if alive else _died(self.process.exitcode or 0)


class _Stopped(BaseException):
    """A worker is to end: no mistake of the run that it is at."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def _serve(pipe: connection.Connection[Any, Any]) -> None:
    """In a worker process: make the runs that come, until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    signal.signal(signal.SIGTERM, _stop)

    def tell(progress: Progress) -> None:
        try:
            pipe.send(progress)
        except OSError:
            raise _Stopped from None  # the parent is gone

    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                pipe.send(make_run(pipe.recv(), tell))
    except _Stopped:
        os._exit(1)  # what was open is closed; threads of a plug-in hold nobody up


def _died(code: int) -> End:
    """The end of a run whose process ended on the way; a signal's number is below 0."""
    how = f"ended with status {code}"
    if code == -signal.SIGKILL:
        how = "was killed (out of memory?)"
    elif code < 0:
        how = f"died of signal {-code} ({signal.strsignal(-code)})"
    told = RunError(
        f"Expected a worker process that finishes, got one that {how}. "
        "Run the same command again: it goes on from the last checkpoint. If memory is short, "
        f"add --jobs 1. {SMALLER}"
    )
    return End(told)


def side_by_side(
    jobs: list[Job], count: int, report: Report, ended: Callable[[Job, End], None]
) -> None:
    """Make the runs in worker processes, a new one where one died."""
    waiting, workers, started = deque(jobs), list[_Worker](), list[_Worker]()
    try:
        while waiting or workers:
            while waiting and len(workers) < count:
                workers.append(_Worker(waiting.popleft()))
                started.append(workers[-1])
            connection.wait([worker.pipe for worker in workers], timeout=0.2)
            workers = [w for w in workers if _at_work(w, waiting, report, ended)]
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        for worker in started:
            worker.process.join()


def _at_work(
    worker: _Worker, waiting: deque[Job], report: Report, ended: Callable[[Job, End], None]
) -> bool:
    """Hear a worker, and give it the next run when its run has ended; False if it gets none."""
    end = worker.end(report)
    if end is None:
        return True
    ended(worker.job, end)
    # What nobody expected may have left a process in which nothing works, a GPU's context say.
    if waiting and not end.trace and worker.process.is_alive():
        worker.give(waiting.popleft())
        return True
    worker.pipe.close()
    return False
