"""What a place that makes runs is given, and the loop of those that are clusters."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from d3po_bench.errors import InUseError, RunError, TryAgainError, UserError, install
from d3po_bench.launch.job import End, make_run
from d3po_bench.launch.state import read_state
from d3po_bench.runs.holder import BEAT, DEAD
from d3po_bench.runs.remote import Mirror, address_of, workplace
from d3po_bench.runs.run import RunFolder
from d3po_bench.training import stopping
from d3po_bench.training.progress import Report
from d3po_bench.training.run import Job

PAUSE, LOOK = 0.5, 5.0
"""Seconds between two questions whether a run has ended, and how far it is."""

RETRIES = 3
"""How often a run is started again whose process died, or was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Runs to make, and who is told of them."""

    jobs: Sequence[Job]
    count: int | None
    """How many side by side; None for as many as there is room for."""
    processes: int = 1
    """That share each run; this one may be a rank itself."""
    ended: Callable[[Job, End], bool]
    """Called with each and how it ended; whether its process can make another."""
    report: Report
    """Called with how far they are."""
    begin: Callable[[int], None]
    """Called once, with how many are made at a time."""
    asked: Mapping[str, str] = field(default_factory=dict)
    """What each run asks of the cluster."""


Place = Callable[[Work], None]
"""Makes the runs, each until it has ended; what Python raises ends them all."""


@dataclass(frozen=True)
class Task:
    """A run as a job of a scheduler: `make` it wherever, until it says that it has finished."""

    job: Job
    address: str | None
    """Of the folder in object storage, which each machine works on in a place of its own."""
    cwd: str
    """Where relative paths begin: those of a config are part of it."""
    path: tuple[str, ...]
    """Where Python looks for the packages of the user's."""

    @classmethod
    def of(cls, job: Job) -> Task:
        """The task for a run that was planned in this process."""
        return cls(job, address_of(job.folder), str(Path.cwd()), tuple(sys.path))

    def make(self) -> tuple[End, int]:
        """Make the run, or resume it.

        A folder whose last process died with its machine is waited for.

        Returns:
            How it ended, and the signal that asked it to stop, 0 if none did.
        """
        try:
            os.chdir(self.cwd)
        except OSError as problem:
            return End(UserError(
                f"{self.cwd} is not on {os.uname().nodename}: {problem.strerror}. Start the "
                "command in a folder that all machines share."
            )), 0  # fmt: skip
        sys.path += [place for place in self.path if place not in sys.path]
        job = self.job
        if self.address:
            job = replace(job, folder=workplace(self.address))
        until = time.monotonic() + DEAD + 2 * BEAT
        with stopping.heeding(*stopping.SIGNALS):
            end = make_run(job, lambda progress: None)
            while (
                isinstance(end.problem, InUseError)
                and time.monotonic() < until
                and not stopping.asked()
            ):
                time.sleep(BEAT / 4)
                end = make_run(job, lambda progress: None)
            return end, stopping.asked()


Poll = Callable[[], End | None]
"""How a job ended, once it has."""


def follow(work: Work, most: int, submit: Callable[[Sequence[Task]], Sequence[Poll]]) -> None:
    """Hand runs to a scheduler, and tell how far they are by what is in their folders.

    Args:
        work: the runs.
        most: how many the scheduler is given at a time.
        submit: gives it some.
    """
    waiting, busy = deque(work.jobs), list[tuple[Job, Poll]]()
    looked = 0.0
    while waiting or busy:
        fresh = [waiting.popleft() for _ in range(min(most - len(busy), len(waiting)))]
        if fresh:
            busy += zip(fresh, submit([Task.of(job) for job in fresh]), strict=True)
        time.sleep(PAUSE)
        look = time.monotonic() - looked > LOOK
        looked = time.monotonic() if look else looked
        for job, poll in list(busy):
            end = poll()
            mirror = Mirror.of(job.folder)  # what is far away is looked at when it has ended
            if end is not None:
                busy.remove((job, poll))
                if mirror:
                    mirror.pull()
                work.ended(job, _seen(job, end))
            if end is not None or (look and not mirror):
                seen = read_state(job.folder, job.config).progress
                work.report(replace(seen, run=job.called))


def _seen(job: Job, end: End) -> End:
    """How a run ended, as far as its folder is seen from here."""
    if end.problem or RunFolder(job.folder).finished:
        return end
    return End(RunError(
        f"The run has finished, but {job.folder} is not seen from this machine. Give an --out that "
        "all machines share."
    ))  # fmt: skip


def lost(what: str) -> End:
    """The end of a run whose process died too often."""
    return End(RunError(
        f"Its process died, and was started again {RETRIES} times: {what}. Correct that, and run "
        "the same command again: it resumes."
    ))  # fmt: skip


def again(end: End) -> bool:
    """Whether a run is worth another try at once."""
    return isinstance(end.problem, TryAgainError)


def values(asked: Mapping[str, str]) -> dict[str, Any]:
    """What was asked for as KEY=VALUE: numbers, true and false, or else text."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return {name: value(text) for name, text in asked.items()}


def require_installed(package: str, where: str) -> None:
    """Refuse a place whose package is not there.

    Raises:
        UserError: saying how to install it.
    """
    if find_spec(package) is None:
        raise UserError(
            f"--where {where} needs the extra `cluster`. Install it: {install('cluster')}."
        )


def common(jobs: Sequence[Job]) -> Path:
    """A folder that all machines share: the one of all runs, or else this one."""
    if address_of(jobs[0].folder):
        return Path.cwd()
    return Path(os.path.commonpath([job.folder.absolute() for job in jobs]))
