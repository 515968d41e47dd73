"""The exceptions that are shown to people as one line, without a traceback."""


class UserError(Exception):
    """Bad input, said in three parts: what was expected, what came, what to do."""

    exit_code = 2


class RunError(UserError):
    """A run that failed on the way; what it had written is kept."""

    exit_code = 1
