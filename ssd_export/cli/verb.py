"""A verb of the command line: options as objects, put on a function that is given what was
asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import click

from ssd_export.extras import check_extras


@dataclass(frozen=True)
class Option:
    """An option of one or more verbs. settings: what click.option takes."""

    flags: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Option:
        """The same option with another help, default or metavar."""
        return replace(self, settings={**self.settings, **changes})

    def __call__(self, function: Any) -> Any:
        """Adds the option to a click command."""
        return click.option(*self.flags, **self.settings)(function)


@dataclass(frozen=True)
class Argument(Option):
    """A positional argument. settings: what click.argument takes."""

    def __call__(self, function: Any) -> Any:
        """Adds the argument to a click command."""
        return click.argument(*self.flags, **self.settings)(function)


def option(*flags: str, **settings: Any) -> Option:
    """An option whose default, if it has one, --help shows."""
    return Option(flags, settings if "is_flag" in settings else {"show_default": True, **settings})


def verb(
    *options: Option, needs: Sequence[str] = ()
) -> Callable[[Callable[..., int | None]], click.Command]:
    """Makes a command of a function that takes the options by name.

    Args: needs: the extras whose packages must be installed (extras.py), said before anything
    else is done.
    """

    def make(function: Callable[..., int | None]) -> click.Command:
        @wraps(function)
        def run(**asked: Any) -> int | None:
            check_extras(needs)
            return function(**asked)

        decorated: Any = run
        for one in reversed(options):
            decorated = one(decorated)
        return click.command()(decorated)

    return make
