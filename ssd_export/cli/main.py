"""The ssd-export command: finds the verb, turns failures into one line and an exit code.

0 done; 1 an error that the user can mend (`error: ...` on stderr), or a bug (traceback); 2 wrong
usage; 3 some images of a file of prompts failed, the others are made; 130 interrupted, 143
terminated: what a shell calls 128 + signal. A verb's module imports torch, onnx and the like inside
its function, so that --help is instant.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import click

from ssd_export.cli import logs
from ssd_export.cli.interrupts import heard_in_destructors
from ssd_export.errors import UserError, printable
from ssd_export.extras import missing_package
from ssd_export.os_errors import os_error
from ssd_export.version import TOOL_VERSION

VERBS = (
    "plan",
    "export",
    "calibrate",
    "build-engine",
    "generate",
    "serve",
    "package",
    "inspect",
    "prompts",
    "embed-prompts",
    "eval",
    "sweep",
    "bench",
    "verify",
    "train-demo",
    "doctor",
)  # in the order of --help; verb build-engine is `command` in build_engine.py
SENTENCE = 200  # letters, more than the first sentence of any verb


class VerbGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of a user's work."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the module of one verb; None for an unknown one."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"ssd_export.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        if not any(option.name == "verbose" for option in command.params):
            logs.verbose_option(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the verb that an unknown one may have been meant for."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            if not close:
                raise
            raise click.UsageError(f"{error.message} Did you mean {close[0]}?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The first sentence of every verb, wrapped where click would cut it."""
        verbs = [(name, self.get_command(ctx, name)) for name in VERBS]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, verb.get_short_help_str(SENTENCE)) for name, verb in verbs if verb]
            )


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(TOOL_VERSION, prog_name="ssd-export")
@logs.verbose_option
def ssd_export() -> None:
    """Exports text-to-image models with a compressed KV cache of fixed size, and generates images
    from the exported bundles.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line (sys.argv without args) and leaves by SystemExit with the exit code."""
    with suppress(ValueError):  # not in the main thread: whoever started it handles signals
        signal.signal(signal.SIGTERM, _terminate)
    try:
        logs.configure()
        with heard_in_destructors():
            code = ssd_export.main(args, prog_name="ssd-export", standalone_mode=False)
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        sys.exit(130)
    except (ImportError, OSError, RecursionError, MemoryError) as error:
        line = _one_line(error)
        if line is None:
            raise
        logging.getLogger("ssd_export.cli").debug("where it went wrong", exc_info=True)
        _say(f"error: {line}")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: BaseException) -> str | None:
    """The cause outside this program and the way out; None for a fault of this program."""
    if isinstance(error, ImportError):
        return missing_package(error)
    if isinstance(error, OSError):
        return str(os_error(error, "use", error.filename or "a file"))
    if isinstance(error, RecursionError):
        return (
            "something is nested deeper than Python goes, most likely a JSON file of the checkpoint"
            " or bundle; get it again from where it came (-v shows where)"
        )
    return f"out of memory ({error}); use a smaller --batch, or close other programs"


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    sys.exit(128 + signum)


def _say(message: str) -> None:
    """One line on stderr, whatever a file name or a prompt smuggles into the message."""
    click.echo(printable(" ".join(message.splitlines())), err=True)
