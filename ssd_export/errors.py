"""The two kinds of failure: what a user can fix, and everything else."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can fix; the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with 1. Anything else that is raised is
    a bug.
    """
