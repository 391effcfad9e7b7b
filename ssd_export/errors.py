"""The two kinds of failure, what a user can fix and everything else, and what messages quote."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can fix; the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with 1. Anything else that is raised is
    a bug. Names and texts of files that a message quotes may hold anything: lines are joined, and
    characters that would steer a terminal are escaped.
    """

    def __init__(self, message: str) -> None:
        """Makes the message one printable line."""
        super().__init__(printable(" ".join(message.splitlines())))


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of what a library's error says, at most so many letters, else its name;
    characters that would steer a terminal are escaped.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0].strip()[:most])


def printable(text: str) -> str:
    """Text whose control characters are escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def short(text: str) -> str:
    """A text of a user in a message: quoted, cut to 40 characters."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
