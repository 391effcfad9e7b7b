"""The log of the command line: notes on stderr by default, details with -v or SSD_LOG=debug.

The library logs through the standard module, below the name `ssd_export`, and never prints. INFO
is for what a user should see (a model that came from the cache), DEBUG for where the time goes.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import Any

import click

from ssd_export.errors import UserError

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "SSD_LOG"


class _StderrHandler(logging.Handler):
    """Writes to stderr as it is at that moment; a line that cannot be written is dropped, because
    the work is worth more.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            click.echo(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    """Notes as they are; details with the time and the module that says it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.INFO:
            return text
        return (
            f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03d} {record.name}: {text}"
        )


def configure(verbose: bool = False) -> None:
    """Sends the library's log to stderr. Raises: UserError for a SSD_LOG that is no level."""
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if asked and asked not in LEVELS:
        raise UserError(f"{VARIABLE}={asked} is no level; use one of {', '.join(LEVELS)}")
    logger = logging.getLogger("ssd_export")
    logger.setLevel(logging.DEBUG if verbose else getattr(logging, (asked or "info").upper()))
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        configure(verbose=True)


def verbose_option(command: Any) -> Any:
    """Adds -v to a command, or to a group."""
    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_verbose,
        help="Log each step and its time to stderr, as SSD_LOG=debug does.",
    )(command)
