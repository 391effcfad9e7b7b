"""ssd-export doctor: what of this package can work on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ssd_export.cli.verb import option, verb
from ssd_export.errors import UserError

if TYPE_CHECKING:
    from ssd_export.doctor.examine import Examination

MARKS = {"ok": "ok", "absent": "-", "broken": "!!"}


@verb(
    option(
        "--for",
        "wanted",
        metavar="NAME,...",
        help=(
            "Subjects of the exit code: export, build-engine, or a runner (ort, torch, trt)."
            "  [default: all of them]"
        ),
        show_default=False,
    ),
    option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)
def command(wanted: str | None, as_json: bool) -> int:
    """Try what this machine has, and say what works.

    Every library is loaded and every execution provider opened with a graph of one node, each in a
    separate process. For each missing piece it gives the command that installs it. Exit code 0:
    everything works; else 32, plus 1 where export cannot work here, 2 build-engine, 4 the ort
    runner, 8 torch, 16 trt.
    """
    from ssd_export.doctor.examine import ABILITIES, examine

    names = tuple(name.strip() for name in (wanted or ",".join(ABILITIES)).split(",") if name)
    unknown = [name for name in names if name not in ABILITIES]
    if unknown or not names:
        raise UserError(
            f"--for {wanted!r}: unknown name {(unknown or [''])[0]!r}; choose from"
            f" {','.join(ABILITIES)}"
        )
    examination = examine()
    if as_json:
        click.echo(json.dumps(examination.to_dict(names), indent=1))
    else:
        for line in lines_of(examination):
            click.echo(line)
    return examination.exit_code(names)


def lines_of(examination: Examination) -> list[str]:
    """Lines for the terminal and for bug reports: findings, then what works."""
    lines = []
    for finding in examination.findings:
        lines.append(f"{MARKS[finding.state]:3} {finding.name}: {finding.says}")
        if finding.fix and finding.state != "ok":
            lines.append(f"      {finding.fix}")
    lines.append("")
    for ability in examination.abilities:
        where = f" ({ability.says})" if ability.says else ""
        works = f"works{where}" if ability.works else f"cannot work here: {ability.problem}"
        lines.append(f"{ability.name}: {works}")
        if not ability.works and ability.fix:
            lines.append(f"      {ability.fix}")
    return lines
