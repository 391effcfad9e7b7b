"""Runs a function as a user without rights, which root, whom tests in containers run as, is not."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from ssd_export.errors import UserError

NOBODY = 65534


def error_without_rights(function: Callable[[], object]) -> str:
    """The message of the UserError that the function ends with, "" where it ends without one.

    Runs in a forked process; what the function needs must be imported already, because this user
    may not read the interpreter's folders either. Any other exception fails the caller.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            function()
            message = "+"
        except UserError as error:
            message = f"+{error}"
        except BaseException:
            message = f"-{traceback.format_exc()}"
        os.write(writing, message.encode("utf-8", "backslashreplace")[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read().decode()
    os.waitpid(child, 0)
    assert message.startswith("+"), message
    return message[1:]
