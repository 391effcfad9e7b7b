"""The log: notes on stderr by default, details where they are asked for, and nothing else
printed.
"""

from __future__ import annotations

import ast
import io
import logging
from pathlib import Path

import click
import pytest

from ssd_export.cli import logs
from ssd_export.cli.main import VERBS, ssd_export
from ssd_export.errors import UserError

PACKAGE = Path(__file__).parents[2] / "ssd_export"


@pytest.fixture(autouse=True)
def fresh_logger() -> None:
    logger = logging.getLogger("ssd_export")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    logger = logging.getLogger("ssd_export.some.module")
    logger.debug("where the time goes")
    logger.info("a note")
    logger.warning("a warning")
    return capsys.readouterr().err.splitlines()


def test_notes_by_default_details_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSD_LOG", raising=False)
    logs.configure()
    logs.configure()  # twice is once
    assert said(capsys) == ["a note", "a warning"]
    logs.configure(verbose=True)
    detail, *rest = said(capsys)
    assert detail.endswith("ssd_export.some.module: where the time goes") and len(rest) == 2


@pytest.mark.parametrize("level, lines", [("debug", 3), ("INFO", 2), ("warning", 1), ("error", 0)])
def test_the_variable_sets_the_level(
    level: str, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSD_LOG", level)
    logs.configure()
    assert len(said(capsys)) == lines


def test_another_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_LOG", "loud")
    with pytest.raises(UserError, match="SSD_LOG=loud is no level; use one of debug"):
        logs.configure()


def test_a_stderr_that_cannot_be_written_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure()
    full = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)
    with pytest.raises(OSError):
        full.write("x")
    monkeypatch.setattr("sys.stderr", full)
    logging.getLogger("ssd_export").warning("lost")


def test_every_verb_takes_it() -> None:
    context = click.Context(ssd_export)
    for verb in VERBS:
        command = ssd_export.get_command(context, verb)
        assert command is not None
        assert [option.name for option in command.params].count("verbose") == 1, verb


def test_library_code_never_prints() -> None:
    """Only the command line, and a module's own `main`, write to stdout and stderr."""
    writers = ("print", "click.echo", "sys.stderr.write", "sys.stdout.write")
    printing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Call) and ast.unparse(node.func) in writers:
                printing.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
            if not (isinstance(node, ast.FunctionDef) and node.name == "main"):
                todo += ast.iter_child_nodes(node)
    assert not printing
