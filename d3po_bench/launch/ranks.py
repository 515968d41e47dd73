"""One run on several processes, a device each: ranks that a launcher started, or that we start."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

from d3po_bench import errors, machine
from d3po_bench.diffusion import parallel
from d3po_bench.errors import RunError, UserError
from d3po_bench.launch.job import SMALLER, End, attempt, how_it_died, make_run
from d3po_bench.launch.local import Died, Worker
from d3po_bench.machine import device_of
from d3po_bench.runs.provenance import packages
from d3po_bench.training.progress import Report
from d3po_bench.training.run import Job

PATIENCE = 30.0
"""Seconds that a rank gets to leave its folder in order, as torchrun's do."""

Ended = Callable[[Job, End], object]


def require(count: int, jobs: int | None, device: str) -> None:
    """Refuse processes that cannot work together, be they started by a launcher or to be started.

    Args:
        count: processes to start for each run.
        jobs: runs side by side.
        device: where they compute.

    Raises:
        UserError: they contradict a launcher, or `jobs`, or the devices are too few.
    """
    joined = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and joined > 1:
        raise UserError(
            f"A launcher has started {joined} ranks, so --ranks {count} cannot start more. Leave "
            "it out."
        )
    if max(count, joined) == 1:
        return
    if (jobs or 1) > 1:
        raise UserError(
            f"With several ranks, runs are made one after the other, so --jobs {jobs} is not "
            "possible. Leave --jobs or the ranks out."
        )
    _require_devices(int(os.environ.get("LOCAL_WORLD_SIZE", count)), device)


def join(device: str, limit: float) -> None:
    """Where a launcher has started several processes: become one of them, once.

    Args:
        device: where they compute.
        limit: seconds that ranks wait for each other.

    Raises:
        UserError: they are on machines or devices of several kinds.
        RunError: the others do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        _join(device, limit)


def _require_devices(count: int, device: str) -> None:
    if ":" in device:
        raise UserError(
            f"--device {device} is one device, and each rank takes its own. Leave it out."
        )
    kind = device_of(device).type
    if kind not in ("cpu", "cuda"):
        raise UserError(f"Ranks work on CUDA GPUs or on CPUs, not on {kind}. Add --device cpu.")
    if kind == "cuda" and torch.cuda.device_count() < count:
        raise UserError(
            f"{count} ranks need {count} GPUs, and this machine has {torch.cuda.device_count()}. "
            "Use fewer ranks, or --device cpu."
        )


def _join(device: str, limit: float) -> None:
    from accelerate import PartialState

    cpu = device_of(device).type == "cpu"
    # What waits for a rank that has died ends with an error, not with the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        state = PartialState(
            cpu=cpu, backend="gloo" if cpu else "cuda:nccl,cpu:gloo",
            timeout=timedelta(seconds=limit),
        )  # fmt: skip
    except (RuntimeError, ValueError) as problem:
        raise RunError(
            f"The ranks did not find each other: {str(problem).splitlines()[0][:200]}. Check "
            "MASTER_ADDR, MASTER_PORT and that all of them were started."
        ) from problem
    atexit.register(state.destroy_process_group)
    parallel.begin(limit)
    errors.speaks = _first_to_tell
    kinds = parallel.gather({**machine.processors(), **packages()})
    for number, kind in enumerate(kinds):
        changed = [name for name in kind if kind[name] != kinds[0].get(name)]
        if changed:
            name = changed[0]
            raise UserError(
                f"Rank {number} has another {name} than rank 0: {kind[name]}, not "
                f"{kinds[0].get(name)}. Ranks that compute alike need machines of one kind."
            )


def _first_to_tell() -> bool:
    """Whether this is the first of the ranks that has something to tell."""
    try:
        return bool(parallel.the_store().add("d3po-bench/told", 1) == 1)
    except (RuntimeError, ValueError):  # it was in a process that has ended
        return True


# ---- the runs


def one_by_one(jobs: Sequence[Job], ended: Ended, report: Report) -> None:
    """Make runs in this process, which may be one of several ranks.

    Args:
        jobs: the runs.
        ended: called with each and how it ended.
        report: called with how far they are.
    """
    end = End()
    for job in jobs:
        if not parallel.lost():  # then the others do not come to any further run
            end = make_run(job, report)
            parallel.settle(PATIENCE if end.problem else None)
        ended(job, end)


@dataclass(frozen=True)
class _Rank:
    """What a process that we start is told."""

    number: int
    world: int
    port: int
    jobs: Sequence[Job]


@dataclass(frozen=True)
class _Made:
    """What a rank tells when a run has ended."""

    job: int
    end: End


def on_ranks(jobs: Sequence[Job], count: int, ended: Ended, report: Report) -> None:
    """Make runs one after the other, each on `count` processes of this machine.

    They end with this process, and all of them once one has died.

    Args:
        jobs: the runs.
        count: processes.
        ended: called with each and how it ended.
        report: called with how far they are.
    """
    made: dict[int, _Made] = {}

    def told(said: Any) -> None:
        if not isinstance(said, _Made):
            report(said)
        elif said.job not in made or (made[said.job].end.lost and not said.end.lost):
            made[said.job] = said  # what went wrong, rather than that another rank is lost

    # Here, it outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    tasks = [_Rank(number, count, store.port, jobs) for number in range(count)]
    workers = [Worker(_make_runs, task) for task in tasks]
    busy, deaths = list(workers), dict[int, int]()
    try:
        _follow(busy, told, deaths)
    finally:
        for worker in busy:
            worker.process.terminate()
        until = time.monotonic() + PATIENCE
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
    for number, job in enumerate(jobs):
        end = made[number].end if number in made else None
        ended(job, _with_deaths(end, deaths) if end is None or end.problem else end)


def _follow(
    busy: list[Worker[_Rank, End]], told: Callable[[Any], None], deaths: dict[int, int]
) -> None:
    """Hear what ranks tell until all have ended, which they do together or because one has died.

    Args:
        busy: those that have not ended; in the end those that did not.
        told: called with what they tell.
        deaths: where the number and the exit status of one that has died go.
    """
    until = float("inf")
    while busy and time.monotonic() < until:
        connection.wait([worker.pipe for worker in busy], timeout=0.2)
        for worker in list(busy):
            end = worker.hear(told)
            if end is None:
                continue
            worker.pipe.close()
            busy.remove(worker)
            if isinstance(end, Died):
                deaths[worker.task.number] = end.code
            until = min(until, time.monotonic() + PATIENCE)


def _with_deaths(end: End | None, deaths: dict[int, int]) -> End:
    """How a run ended of which a rank has died, and what another rank told of that."""
    if end is None:
        end = End(RunError(f"Run the same command again: it resumes. {SMALLER}"))
    if not deaths:
        return end
    number, code = next(iter(deaths.items()))
    return End(RunError(f"Rank {number} {how_it_died(code)}. {end.problem}"), end.trace)


def _make_runs(task: _Rank, tell: Callable[[Any], None]) -> End:
    """In a process that was started for it: be a rank."""
    os.environ |= {
        "RANK": str(task.number), "LOCAL_RANK": str(task.number),
        "WORLD_SIZE": str(task.world), "LOCAL_WORLD_SIZE": str(task.world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(task.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's
    }  # fmt: skip
    if "OMP_NUM_THREADS" not in os.environ:  # as torchrun has it
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    numbers = {id(job): number for number, job in enumerate(task.jobs)}

    def ended(job: Job, end: End) -> None:
        if task.number == 0 or parallel.lost():
            tell(_Made(numbers[id(job)], end))

    def make() -> None:
        execution = task.jobs[0].execution
        _join(execution.device, execution.rank_timeout)
        one_by_one(task.jobs, ended, tell if task.number == 0 else lambda progress: None)

    end = attempt(make, SMALLER)
    if end.problem is not None:  # there was no group
        for job in task.jobs:
            tell(_Made(numbers[id(job)], end))
    return end
