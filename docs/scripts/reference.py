"""docs/reference/command-line.md: every verb and option, from the command line's own declarations.

    python -m docs.scripts.reference [--check]

--check writes nothing and exits with 1 where the page differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ssd_export.cli.main import VERBS, ssd_export

PAGE = Path(__file__).parents[1] / "reference" / "command-line.md"
COMMAND = "python -m docs.scripts.reference"
INTRODUCTION = f"""# Command line

<!-- written by `{COMMAND}` from ssd_export/cli -->

`ssd-export VERB`, or `python cli.py VERB` in a checkout. `VERB --help` prints the same.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error that you can fix: one line on stderr, with the fix (or a bug: a traceback) |
| 2 | wrong usage |
| 130, 143 | interrupted by Ctrl-C, ended by a signal |
"""


def page() -> str:
    """The whole page."""
    # click remembers the help option of a command's first context: as a user would see it.
    context = click.Context(ssd_export, info_name="ssd-export", **ssd_export.context_settings)
    verbs = [(verb, ssd_export.get_command(context, verb)) for verb in VERBS]
    listed = [f"| [`{verb}`](#{verb}) | {first_line(command)} |" for verb, command in verbs]
    parts = [INTRODUCTION + "\n| verb | what it does |\n|---|---|\n" + "\n".join(listed)]
    parts += [section(verb, command, context) for verb, command in verbs]
    return "\n\n".join(parts) + "\n"


def first_line(command: click.Command) -> str:
    return escaped(" ".join((command.help or "").split("\n\n")[0].split())).rstrip(".")


def section(verb: str, command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, info_name=verb, parent=parent)
    usage = " ".join(["ssd-export", verb, *command.collect_usage_pieces(context)])
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    options = [
        "| option | default | meaning |",
        "|---|---|---|",
        *(row(option, context) for option in options_of(command, context)),
    ]
    text = [f"## {verb}", *map(escaped, paragraphs), f"```text\n{usage}\n```", "\n".join(options)]
    return "\n\n".join(text)


def options_of(command: click.Command, context: click.Context) -> Iterator[click.Option]:
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and "--help" not in parameter.opts:
            yield parameter


def row(option: click.Option, context: click.Context) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {option.make_metavar(context)}"
    meaning, _, default = (option.help or "").partition("[default:")
    if default:
        shown = default.strip().removesuffix("]")
    elif option.show_default and option.default is not None:
        shown = str(option.get_default(context))
    else:
        shown = ""
    meaning = " ".join(meaning.split())
    return table_row(f"`{names}{value}`", escaped(shown), escaped(meaning))


def table_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def escaped(text: str) -> str:
    """Text in which Markdown finds no tag and no emphasis."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def main() -> int:
    wanted = page()
    same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted
    if "--check" in sys.argv[1:]:
        if not same:
            print(f"{PAGE.name} differs from the command line: run `{COMMAND}`", file=sys.stderr)
        return 0 if same else 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
