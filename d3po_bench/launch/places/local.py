"""This machine: a process for each GPU, or for each core where a model is small."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from d3po_bench import own
from d3po_bench.diffusion import parallel
from d3po_bench.errors import UserError
from d3po_bench.launch import ranks
from d3po_bench.launch.job import SMALLER, End, died, make_run
from d3po_bench.launch.local import Died, side_by_side
from d3po_bench.launch.place import Place, Work
from d3po_bench.machine import device_of
from d3po_bench.models.sources import model_source
from d3po_bench.training import stopping
from d3po_bench.training.run import Job


def make(work: Work) -> None:
    """Make the runs, side by side where there is room.

    SIGTERM and SIGUSR1 end them after the rounds that are under way, a second one at once; runs
    that several ranks share end at once.

    Raises:
        UserError: something is asked of a cluster.
    """
    if work.asked:
        raise UserError(
            "--ask is for a cluster: add --where ray or --where slurm, or leave it out."
        )
    alone = max(work.processes, parallel.world()) == 1
    gpus = _gpus(work.jobs[0].execution.device) if alone else []
    count = (work.count or len(gpus) or _as_many_as_fit(work.jobs[0])) if alone else 1
    work.begin(count)
    if max(work.processes, min(count, len(work.jobs))) > 1:
        for job in work.jobs:
            own.require_portable(job.objects)
    if alone:
        _alone(work, count, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus])
        return
    with _terminable():
        if work.processes > 1:
            ranks.on_ranks(work.jobs, work.processes, work.ended, work.report)
        else:
            ranks.one_by_one(work.jobs, work.ended, work.report)


def _alone(work: Work, count: int, places: Sequence[Mapping[str, str]]) -> None:
    """Make runs that have a process each, and end after a round if asked to."""
    left = {id(job): job for job in work.jobs}

    def ended(job: Job, found: End | Died) -> bool:
        del left[id(job)]
        if isinstance(found, Died):  # of the signal, which the whole group got, perhaps
            asked = stopping.asked()
            found = End(stopping.stopped("in a round")) if asked else died(found.code, SMALLER)
        return work.ended(job, found)

    with stopping.heeding(signal.SIGTERM, signal.SIGUSR1):
        if min(count, len(work.jobs)) > 1:
            side_by_side(make_run, work.jobs, count, ended, work.report,
                         places=places, stop=stopping.asked)  # fmt: skip
        else:
            for job in work.jobs:
                if not stopping.asked():
                    ended(job, make_run(job, work.report))
    for job in [*left.values()]:
        ended(job, End(stopping.stopped("before its first round")))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C: ranks that wait for each other end together, and at once.

    A rank that has lost the others ends by itself, with a line that says why. Its launcher, which
    sees at the same time that one has died, must not keep it from saying so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if parallel.lost() else before)


def _gpus(device: str) -> list[str]:
    """What CUDA calls the GPUs that runs may be spread over; none where one was chosen."""
    if ":" in device or device_of(device).type != "cuda" or torch.cuda.device_count() < 2:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]


def _as_many_as_fit(job: Job) -> int:
    """One run per core for a small model on a CPU; others may not fit twice."""
    small = model_source(job.config.model).small
    if not small or device_of(job.execution.device).type != "cpu":
        return 1
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


PLACE: Place = make
