"""Errors that belong to the user, not to the program."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a wrong flag, a missing folder, a damaged file, a full disk.

    The message is one sentence that names the parameter or the file, says what is wrong and what to do. The command
    line prints it on one line, without a traceback, and exits with code 2.
    """


class ReportedError(UserError):
    """An error that another process of the same run has printed: the command ends with code 2 and says nothing."""
