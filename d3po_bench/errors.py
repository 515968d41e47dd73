"""The exceptions that are shown to people as one line, without a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NoReturn


class UserError(Exception):
    """Bad input: the fault and the remedy, in one line."""

    exit_code = 2


class RunError(UserError):
    """A run that failed on the way; what it had written is kept."""

    exit_code = 1


class TooLarge(MemoryError):  # noqa: N818
    """Out of memory in work whose size is a setting."""

    def __init__(self, setting: str, size: int, remedy: str) -> None:
        """What did not fit.

        Args:
            setting: that decides how much is computed at a time.
            size: what it was.
            remedy: the settings to give, for people.
        """
        super().__init__(f"Out of memory with {setting}={size}. Try {remedy}.")
        self.setting, self.size = setting, size


def install(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f"pip install -c constraints.txt 'd3po-bench[{extra}]'"


PLACED_BY: ContextVar[str] = ContextVar("PLACED_BY", default="--out")
"""What people give to have something written elsewhere."""


@contextlib.contextmanager
def placed_by(name: str) -> Iterator[None]:
    """Around a command whose argument or option for what it writes is not --out."""
    before = PLACED_BY.set(name)
    try:
        yield
    finally:
        PLACED_BY.reset(before)


class InUseError(UserError):
    """Another process works in the same folder."""


class TryAgainError(RunError):
    """A run was asked to stop after its round: the same command resumes it."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h, which means the same."""


@contextlib.contextmanager
def said_in_one_line() -> Iterator[None]:
    """Around a script's work: a `UserError` becomes a line on stderr and an exit status.

    Raises:
        SystemExit: with the error's `exit_code`.
    """
    try:
        yield
    except UserError as problem:
        fail(str(problem), problem.exit_code)


def leads() -> bool:
    """Whether this process speaks to people: of several that a launcher started, the first does."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


speaks: Callable[[], bool] = leads
"""Whether this process tells what ends it. Ranks that know each other put theirs in its place."""


def fail(message: str, code: int) -> NoReturn:
    """Print `message` in one line on stderr, and end with the exit status `code`."""
    if not speaks():
        sys.exit(code)
    line = " ".join(message.split())
    # A name from the command line may hold bytes that are no text.
    with contextlib.suppress(OSError):  # where stderr is full, the exit status is all there is
        print(f"error: {line.encode(errors='backslashreplace').decode()}", file=sys.stderr)
    sys.exit(code)


_NO_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc",
    "bad allocation", "alloc_failed",
)  # fmt: skip
"""What torch, its CUDA libraries, and the loaders say, in lower case."""


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that this machine or device has no memory left."""
    if isinstance(problem, MemoryError):
        return True
    text = str(problem).lower()
    return isinstance(problem, RuntimeError | OSError) and any(s in text for s in _NO_MEMORY)


OF_THE_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "there is a limit on the size of files",
    errno.EIO: "the disk has an input/output error",
}
"""Not the fault of the command, which works once it is put right."""


def of_system(problem: OSError) -> UserError | None:
    """The error for what the system refused, wherever that happened; None for a mistake of ours."""
    if problem.filename is None:
        if problem.errno not in OF_THE_DISK:
            return None
        return RunError(
            f"The output cannot be written: {OF_THE_DISK[problem.errno]}. Fix that and run the "
            "same command again."
        )
    name = str(problem.filename)
    shown = name if len(name) <= 200 else name[:197] + "..."
    return UserError(
        f"{shown} cannot be read or written: {problem.strerror}. Correct the path, or the "
        "permissions of what is there."
    )
