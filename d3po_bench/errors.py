"""The exceptions that are shown to people as one line, without a traceback."""


class UserError(Exception):
    """Bad input, said in three parts: what was expected, what came, what to do."""

    exit_code = 2


class RunError(UserError):
    """A run that failed on the way; what it had written is kept."""

    exit_code = 1


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
