"""One run as a job: how it ended, as something that crosses processes."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from d3po_bench.diffusion import parallel
from d3po_bench.errors import (
    InUseError,
    RunError,
    TryAgainError,
    UserError,
    is_out_of_memory,
    of_system,
)
from d3po_bench.training.progress import Report
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
    """Make one run; all but Ctrl-C and its like is caught."""
    return attempt(lambda: run_seed(job, report), SMALLER)


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
            return End(RunError(f"Out of memory. {smaller}"))
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
