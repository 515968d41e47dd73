"""Worker processes of this machine, each doing one task after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from d3po_bench.training import stopping

Task = TypeVar("Task")
Result = TypeVar("Result")

CONTEXT = multiprocessing.get_context("spawn")
"""How processes are started."""

GRACE = 5.0
"""Seconds that a worker gets to leave its folder in order."""

Work = Callable[[Task, Callable[[Any], None]], Result]
"""Does a task in a worker process, telling how far it is; a function of a module."""


@dataclass(frozen=True)
class Died:
    """What a task has in place of a result when its process ended on the way."""

    code: int
    """Exit status; a signal's number below 0."""


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What a worker says last of a task."""

    result: Result


class Worker(Generic[Task, Result]):
    """A process that does one task after the other, and what it is at.

    Each has a pipe of its own: a queue that several share can stay locked when one is killed,
    and does not tell whose task that was.
    """

    def __init__(
        self, work: Work[Task, Result], task: Task, number: int = 0, place: Mapping[str, str] = {}
    ) -> None:
        """Start a process that does `task` with `work`, with the variables of its `place`."""
        self.number = number
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, work))
        with _environment(place):  # CUDA reads it once, long before there is a task
            self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.give(task)

    def give(self, task: Task) -> None:
        """Let it do that task."""
        self.task = task
        with contextlib.suppress(OSError):  # it has died, and `hear` will say so
            self.pipe.send(task)

    def hear(self, told: Callable[[Any], None]) -> Done[Result] | Died | None:
        """Pass on what the task has told; how it ended, if it has."""
        while True:
            alive = self.process.is_alive()  # asked first: what it said last is in the pipe
            try:
                said = self.pipe.recv() if self.pipe.poll() else None
            except (EOFError, OSError):
                self.process.join()
                said, alive = None, False
            if isinstance(said, Done):
                return said
            if said is None:
                return None if alive else Died(self.process.exitcode or 0)
            told(said)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Give processes that are started other variables than this one has."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Stopped(BaseException):
    """A worker is to end: no mistake of the task that it is at."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def _end_with_parent() -> None:
    """In a worker process: end once the parent has, though a kill left it no time to say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)  # as the parent would have done
        time.sleep(GRACE)
        os._exit(1)  # as if killed itself: files are written whole or not at all


def _serve(pipe: connection.Connection[Any, Any], work: Work[Any, Any]) -> None:
    """In a worker process: do the tasks that come, until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGUSR1, stopping.wish)
    # A task may tell nothing for hours, and would find out no sooner.
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(said: Any) -> None:
        try:
            pipe.send(said)
        except OSError:
            raise _Stopped from None  # the parent is gone

    try:
        while True:
            try:
                task = pipe.recv()
            except (EOFError, OSError):
                return
            tell(Done(work(task, tell)))
    except _Stopped:
        os._exit(1)  # what was open is closed; threads of a plug-in hold nobody up


def side_by_side(
    work: Work[Task, Result],
    tasks: Iterable[Task],
    count: int,
    ended: Callable[[Task, Result | Died], bool],
    told: Callable[[Any], None] = lambda said: None,
    *,
    places: Sequence[Mapping[str, str]] = (),
    stop: Callable[[], object] = lambda: False,
) -> None:
    """Do the tasks in worker processes, a new one where one died. All end with this process.

    Args:
        work: what to do with each task, in a worker.
        tasks: pickled on the way, as their results are.
        count: workers at a time.
        ended: called with each task and its result; whether its process can do another.
        told: called with what the tasks tell on the way.
        places: variables of the environment that send a worker to its GPU; one in turn for each.
        stop: whether workers are to end after the round that they are at, and no task to begin.
    """
    waiting, workers = deque(tasks), list[Worker[Task, Result]]()
    started = list[Worker[Task, Result]]()
    asked = False
    try:
        while waiting or workers:
            while waiting and len(workers) < count:
                free = next(n for n in count_from(0) if n not in [w.number for w in workers])
                place = places[free % len(places)] if places else {}
                workers.append(Worker(work, waiting.popleft(), free, place))
                started.append(workers[-1])
            connection.wait([worker.pipe for worker in workers], timeout=0.2)
            if stop() and not asked:
                asked = True
                waiting.clear()
                _ask(workers)
            for worker in [w for w in workers if _heard(w, told, ended, waiting)]:
                worker.pipe.close()
                workers.remove(worker)
    except BaseException:
        for worker in started:
            worker.process.terminate()
        raise
    finally:
        for worker in started:
            worker.process.join()


def _ask(workers: Iterable[Worker[Any, Any]]) -> None:
    """Ask workers to end after their round."""
    for worker in workers:
        if worker.process.is_alive() and worker.process.pid:
            os.kill(worker.process.pid, signal.SIGUSR1)


def _heard(
    worker: Worker[Task, Result], told: Callable[[Any], None],
    ended: Callable[[Task, Result | Died], bool], waiting: deque[Task],
) -> bool:  # fmt: skip
    """Hear what a worker tells, and give it the next task; whether it can do no more."""
    end = worker.hear(told)
    if end is None:
        return False
    reusable = ended(worker.task, end.result if isinstance(end, Done) else end)
    if not (reusable and waiting and worker.process.is_alive()):
        return True
    worker.give(waiting.popleft())
    return False
