"""One run as a job: how it ended, as something that crosses processes."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from d3po_bench.errors import RunError, UserError, is_out_of_memory, of_file
from d3po_bench.training.progress import Report
from d3po_bench.training.run import Job, run_seed


@dataclass(frozen=True)
class End:
    """How a run ended.

    It goes from process to process, so the error is one of ours; and it holds no frames of the
    run, whose model would fill the memory of the next one.
    """

    problem: UserError | None = None
    trace: str = ""
    """The traceback, where nobody expected the problem."""


def make_run(job: Job, report: Report) -> End:
    """Make one run; only what is no Exception, such as Ctrl-C, goes through."""
    try:
        run_seed(job, report)
    except UserError as problem:
        kind = RunError if isinstance(problem, RunError) else UserError
        return End(kind(str(problem)))
    except (Exception, SystemExit) as problem:  # a plug-in that exits is one that failed
        if is_out_of_memory(problem):
            return End(out_of_memory())
        if isinstance(problem, OSError) and problem.filename is not None:
            return End(of_file(problem))
        return _unexpected(problem)
    return End()


LONGEST = 300
"""Characters of a foreign exception that a line quotes."""


def _unexpected(problem: BaseException) -> End:
    """A mistake in the package or in a plug-in: its author needs the traceback."""
    said = " ".join("".join(traceback.format_exception_only(problem)).split())
    shown = said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."
    told = RunError(
        f"Expected a run that finishes, got {shown} (traceback above). Mend what the traceback "
        "names, and run the same command again: it goes on from the last checkpoint."
    )
    return End(told, "".join(traceback.format_exception(problem)))


SMALLER = (
    "Make the batches smaller: --set micro_batch=8 --set sample_batch=16 --set "
    "reference_batch=16, or --set gradient_checkpointing=true."
)


def out_of_memory() -> RunError:
    """The error for a device or machine without enough memory."""
    return RunError(f"Expected enough memory for a batch, got none left. {SMALLER}")
