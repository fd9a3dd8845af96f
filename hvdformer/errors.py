"""The two ways a command ends badly: the user's mistake (exit 2) and a failure of the run (exit 1)."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right. The message says what was found, what was expected and what to do.

    The command line prints it once, from one rank and without a traceback, and exits with code 2.
    """

    exit_code = 2


class RunError(RuntimeError):
    """A run that could not go on through no fault in its input (full disk, ranks that differ, ...): exit code 1."""

    exit_code = 1
