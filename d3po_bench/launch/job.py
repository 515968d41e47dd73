"""One run as a job: how it ended, as something that crosses processes."""

from __future__ import annotations

import gc
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from d3po_bench.diffusion import parallel
from d3po_bench.errors import (
    InUseError,
    RunError,
    TooLarge,
    TryAgainError,
    UserError,
    is_out_of_memory,
    of_system,
)
from d3po_bench.runs.run import RunFolder
from d3po_bench.training.progress import Progress, Report, planned
from d3po_bench.training.run import Job, run_seed


@dataclass(frozen=True)
class End:
    """How a piece of work ended.

    It goes from process to process, so the error is one of ours; and it holds no frames of the
    work, whose model would fill the memory of the next one.
    """

    problem: UserError | None = None
    trace: str = ""
    """The traceback, where nobody expected the problem."""
    lost: bool = False
    """Whether it failed because another rank was no more."""


KINDS = (InUseError, TryAgainError, RunError, UserError)
"""Of problems; whatever else they hold stays in the process."""

LONGEST = 300
"""Characters of a foreign exception that a line quotes."""

SMALLER = (
    "Make the batches smaller: --set micro_batch=8 --set sample_batch=16 --set "
    "reference_batch=16, or --set gradient_checkpointing=true."
)
"""How a run needs less memory."""


def make_run(job: Job, report: Report) -> End:
    """Make one run; all but Ctrl-C and its like is caught.

    A batch that was chosen and turns out too large in the first round is halved, once.
    """

    def told(progress: Progress) -> None:
        report(replace(progress, run=job.called))

    def work() -> None:
        smaller = _tried(job, told)
        if smaller is not None:
            gc.collect()  # the model of the first try
            torch.cuda.empty_cache()
            run_seed(smaller, told)

    return attempt(work, SMALLER)


def _tried(job: Job, report: Report) -> Job | None:
    """Make a run; where it has to begin again with a smaller batch, that.

    Ranks do not begin again: one that found no memory would not find the others.
    """
    try:
        run_seed(job, report)
    except TooLarge as problem:
        name, size = problem.setting, problem.size
        left = getattr(job.execution, name) == 0 and size > 1 and parallel.world() == 1
        if not left or RunFolder(job.folder).metrics:
            raise
        note = f"{job.called}: out of memory with {name}={size}: trying {size // 2}"
        report(replace(planned(job.config), note=note))
        half: dict[str, Any] = {name: size // 2}
        return replace(job, execution=replace(job.execution, **half))
    return None


def attempt(work: Callable[[], None], smaller: str) -> End:
    """Do some work, and say how it ended.

    Args:
        work: all but Ctrl-C and its like is caught.
        smaller: how it needs less memory, for people.
    """
    try:
        work()
    except UserError as problem:
        kind = next(kind for kind in KINDS if isinstance(problem, kind))
        return End(kind(str(problem)), lost=parallel.lost())
    except (Exception, SystemExit) as problem:  # a plug-in that exits is one that failed
        if is_out_of_memory(problem):
            said = str(problem) if isinstance(problem, TooLarge) else f"Out of memory. {smaller}"
            return End(RunError(said))
        if isinstance(problem, OSError) and (told := of_system(problem)):
            return End(told)
        # A mistake in the package or in a plug-in: its author needs the traceback.
        said = " ".join("".join(traceback.format_exception_only(problem)).split())
        shown = said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."
        told = RunError(
            f"Failed with {shown} (traceback above). Correct what the traceback names, and run "
            "the same command again: it resumes."
        )
        return End(told, "".join(traceback.format_exception(problem)))
    return End()


def how_it_died(code: int) -> str:
    """What to say of a process by its exit status; a signal's number is below 0."""
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    if code < 0:
        return f"died of signal {-code} ({signal.strsignal(-code)})"
    return f"ended with status {code}"


def died(code: int, smaller: str) -> End:
    """The end of work whose process ended on the way.

    Args:
        code: its exit status; a signal's number is below 0.
        smaller: how it needs less memory, for people.
    """
    return End(
        RunError(
            f"The worker process {how_it_died(code)}. Run the same command again: it resumes. If "
            f"memory is short, add --jobs 1. {smaller}"
        )
    )
