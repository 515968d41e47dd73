"""Slurm, through submitit: an array of jobs, requeued when they are preempted or out of time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Sequence
from typing import Any

from d3po_bench.errors import UserError
from d3po_bench.launch.job import End
from d3po_bench.launch.place import (
    RETRIES,
    Place,
    Poll,
    Task,
    Work,
    again,
    common,
    follow,
    lost,
    require_installed,
    values,
)

USUAL = {"name": "d3po-bench", "timeout_min": 240}
"""What a job asks for; a run that is out of time is resumed by the next job."""

TIMEOUTS = 1000
"""How often a job may be out of time."""


class _Submitted:
    """A run as submitit calls it, which pickles this."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self) -> End:
        handler = signal.getsignal(signal.SIGUSR2)  # submitit's: sends the job back to the queue
        end, number = self.task.make()
        if again(end) and number == signal.SIGUSR2 and callable(handler):
            handler(number, None)
        return end

    def checkpoint(self) -> Any:
        """What the job is when it starts again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def make(work: Work) -> None:
    """Make the runs as jobs of an array; or with --ask cluster=local as processes, to try it."""
    require_installed("submitit", "slurm")
    executor = _executor(work)
    jobs: list[Any] = []

    def start(tasks: Sequence[Task]) -> list[Any]:
        with executor.batch():
            fresh = [executor.submit(_Submitted(task)) for task in tasks]
        jobs.extend(fresh)
        return fresh

    def submit(tasks: Sequence[Task]) -> list[Poll]:
        return [_Poll(start, task, job) for task, job in zip(tasks, start(tasks), strict=True)]

    at_once = work.count or (len(work.jobs) if executor.cluster == "slurm" else os.cpu_count() or 1)
    work.begin(at_once)
    try:  # Slurm gets all: it has them wait in its queue, and starts them without us
        follow(work, len(work.jobs) if executor.cluster == "slurm" else at_once, submit)
    except BaseException:
        for job in jobs:
            with contextlib.suppress(Exception):  # whatever scancel says of one that has ended
                job.cancel()
        raise


def _executor(work: Work) -> Any:
    import submitit

    asked = values(work.asked)
    cluster = asked.pop("cluster", "slurm")
    if cluster == "slurm" and shutil.which("srun") is None:
        raise UserError(
            "There is no Slurm here: srun is not found. Run this where Slurm is, or try it with "
            "--ask cluster=local."
        )
    many = {"slurm_array_parallelism": work.count} if work.count else {}
    try:
        executor = submitit.AutoExecutor(
            common(work.jobs) / ".jobs", cluster=cluster, slurm_max_num_timeout=TIMEOUTS
        )
        executor.update_parameters(**{**USUAL, **many, **asked})
    except (NameError, TypeError, ValueError, AssertionError) as problem:
        raise UserError(
            f"submitit does not take what is asked for: {problem}. Give its parameters, such as "
            "--ask timeout_min=120 --ask slurm_partition=gpu --ask gpus_per_node=1."
        ) from problem
    return executor


class _Poll:
    """Asks how a job ended, and starts it again if it died."""

    def __init__(self, start: Any, task: Task, job: Any) -> None:
        self.start, self.task, self.job = start, task, job
        self.left = RETRIES

    def __call__(self) -> End | None:
        from submitit.core.utils import UncompletedJobError

        if not self.job.done():
            return None
        try:
            end: End = self.job.result()
        except UncompletedJobError as problem:
            end = lost(" ".join(str(problem).split())[:300])
        else:
            if not again(end):
                return end
        if not self.left:
            return end
        self.left -= 1
        (self.job,) = self.start([self.task])
        return None


PLACE: Place = make
