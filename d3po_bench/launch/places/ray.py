"""Ray: a task for each run, on a cluster that is there or on one of this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from d3po_bench.errors import RunError, TryAgainError, UserError
from d3po_bench.launch.job import End
from d3po_bench.launch.local import GRACE
from d3po_bench.launch.place import (
    RETRIES,
    Place,
    Poll,
    Task,
    Work,
    again,
    follow,
    lost,
    require_installed,
    values,
)


def _make(task: Task) -> End:
    """On a worker of the cluster; what Ray is to try again is raised.

    Raises:
        TryAgainError: the run was asked to stop.
    """
    end, _ = task.make()
    if again(end):
        raise TryAgainError(str(end.problem))
    return end


def make(work: Work) -> None:
    """Make the runs as Ray tasks, of the cluster in RAY_ADDRESS, a running one, or a new one."""
    require_installed("ray", "ray")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unasked
    mine = not ray.is_initialized()
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as problem:
        said = str(problem).partition("\n")[0]
        raise RunError(
            f"Ray does not start: {said}. Set RAY_ADDRESS to a cluster that runs, or unset it."
        ) from problem
    refs: list[Any] = []
    try:
        remote = _remote(ray, work)

        def submit(tasks: Sequence[Task]) -> list[Poll]:
            fresh = [remote.remote(task) for task in tasks]
            refs.extend(fresh)
            return [_poll(ray, ref) for ref in fresh]

        work.begin(work.count or int(ray.cluster_resources().get("CPU", 1)))
        follow(work, work.count or len(work.jobs), submit)
    except BaseException:
        for ref in refs:  # as Ctrl-C would: finished rounds are written
            ray.cancel(ref)
        ray.wait(refs, num_returns=len(refs), timeout=GRACE) if refs else None
        raise
    finally:
        if mine:
            ray.shutdown()


def _remote(ray: Any, work: Work) -> Any:
    """The function, with what a run asks for: a core, and a GPU where there are any."""
    gpus = ray.cluster_resources().get("GPU", 0) and work.jobs[0].execution.device != "cpu"
    usual = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_retries": RETRIES}
    asked = values(work.asked)
    try:
        return ray.remote(_make).options(retry_exceptions=[TryAgainError], **{**usual, **asked})
    except (ValueError, TypeError) as problem:
        raise UserError(
            f"Ray does not know --ask {' --ask '.join(f'{k}={v}' for k, v in work.asked.items())}: "
            f"{problem}. Give options of a task, such as num_gpus=0.25."
        ) from problem


def _poll(ray: Any, ref: Any) -> Poll:
    def poll() -> End | None:
        if not ray.wait([ref], timeout=0)[0]:
            return None
        try:
            end: End = ray.get(ref)
        except ray.exceptions.RayError as problem:
            cause = getattr(problem, "cause", None)
            return End(TryAgainError(str(cause))) if isinstance(cause, TryAgainError) else lost(
                str(problem).partition("\n")[0]
            )  # fmt: skip
        return end

    return poll


PLACE: Place = make
