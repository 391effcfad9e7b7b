"""Fenced blocks of a Markdown document, and how each is executed.

A comment directly above a fence says what is special about it:
    <!-- not run: REASON -->      not executed; commands of ours are still parsed by the command
    line <!-- needs: MODULE -->        executed where the module can be imported
    <!-- with: TEXT = WHAT -->    TEXT is replaced by what the test provides under that name
    <!-- from: PATH -->           not executed: stands in PATH, which another test compiles
    <!-- file: PATH -->           not executed: written to PATH of a copy of the repository
    <!-- output -->               what the block before it prints; a line may have `...` in it, and
    a
                                  line of `...` stands for any lines
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from ssd_export.cli.main import ssd_export
from tests.forked import forked_python

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]*?) -->\n)?^```(?P<language>[\w{}-]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
EXECUTED = ("bash", "python", "diff")
IN_A_COPY = ("diff",)
# The command that many documents begin with: one runs it, the others are given what it made.
COMMON_EXPORT = ".venv/bin/python cli.py export --model demo --budget 0.2 --force\n"
COPIED = ("*.md", "*.py", "ssd_export", "tests", "docs", "benchmarks", "pyproject.toml")


@dataclass(frozen=True)
class Snippet:
    """A fenced block; comment: what the line above it says, "" without one."""

    document: str
    line: int
    language: str
    text: str
    comment: str

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}"

    def asked(self, what: str) -> str | None:
        """What stands behind `what:` in the comment, or None."""
        name, _, rest = self.comment.partition(":")
        return rest.strip() if name == what else None

    @property
    def is_executed(self) -> bool:
        return self.language in EXECUTED and self.asked("not run") is None

    @property
    def needs_a_copy(self) -> bool:
        return self.language in IN_A_COPY or self.asked("file") is not None


def snippets(document: str) -> list[Snippet]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Snippet(
            document,
            text[: match.start("language")].count("\n") + 1,
            match["language"],
            match["text"],
            match["comment"] or "",
        )
        for match in FENCE.finditer(text)
    ]


class Scratch:
    """A folder in which the blocks of one document are executed, one after the other.

    It looks like a checkout: cli.py stands there, as a link, or with copy=True a copy of the
    sources that a block may change. common: a folder for what COMMON_EXPORT makes of the sources
    as they are.
    """

    def __init__(
        self, folder: Path, copy: bool, replaced: Mapping[str, str], common: Path | None = None
    ) -> None:
        self.folder, self.said = folder, ""
        self._common = None if copy else common
        self._python = forked_python()
        self._replaced = {".venv/bin/python": shlex.join(self._python), **replaced}
        if copy:
            for name in COPIED:
                copy_tracked(name, folder)
        else:
            (folder / "cli.py").symlink_to(ROOT / "cli.py")
        binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        home = folder if copy else ROOT
        self._environment = {**os.environ, "PYTHONPATH": str(home), "PATH": binaries}

    def execute(self, snippet: Snippet) -> None:
        """Raises: AssertionError with what was printed, where the block fails or prints
        otherwise.
        """
        if snippet.comment == "output":
            expected = snippet.text.splitlines()
            assert matches(expected, self.said.splitlines()), f"{snippet.where}: {self.said}"
        elif (path := snippet.asked("file")) is not None:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(snippet.text, encoding="utf-8")
        elif snippet.is_executed and self._can(snippet):
            self._run(snippet)

    def _can(self, snippet: Snippet) -> bool:
        module = snippet.asked("needs")
        return module is None or importlib.util.find_spec(module) is not None

    def _run(self, snippet: Snippet) -> None:
        text = self._with_common_export(snippet.text)
        for written, meant in self._replaced.items():
            text = text.replace(written, meant)
        commands = {
            "bash": ["bash", "-euo", "pipefail", "-c", text],
            "python": [*self._python, "-c", text],
            "diff": ["git", "apply", "--recount", "--verbose", "-"],
        }
        done = subprocess.run(
            commands[snippet.language],
            cwd=self.folder,
            env=self._environment,
            input=text if snippet.language == "diff" else "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,  # ends what hangs, on the busiest machine
        )
        self.said = done.stdout
        assert done.returncode == 0, f"{snippet.where}: exit code {done.returncode}\n{self.said}"

    def _with_common_export(self, text: str) -> str:
        """The block, with the first export into an empty folder run or copied."""
        if self._common is None or (self.folder / "bundles").exists():
            return text
        said, made = (shlex.quote(str(self._common / name)) for name in ("said", "bundles"))
        if (self._common / "said").exists():
            return text.replace(COMMON_EXPORT, f"cp -r {made} . && cat {said}\n", 1)
        keep = f"cp -r bundles {made} && mv {said}.now {said}"
        once = f"{COMMON_EXPORT.strip()} 2>&1 | tee {said}.now && {keep}\n"
        return text.replace(COMMON_EXPORT, once, 1)


def copy_tracked(name: str, folder: Path) -> None:
    """Copies what git knows of a file or folder of the repository, with changes not yet
    committed.
    """
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", name]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in filter(None, names.split("\0")):
        if (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / path)


def matches(expected: list[str], said: list[str]) -> bool:
    """Whether the printed lines are the expected ones, `...` standing for anything."""
    if not expected:
        return not said
    first, rest = expected[0], expected[1:]
    if first.strip() == "...":
        return any(matches(rest, said[start:]) for start in range(len(said) + 1))
    pattern = ".*".join(re.escape(part) for part in first.rstrip().split("..."))
    return bool(said) and bool(re.fullmatch(pattern, said[0].rstrip())) and matches(rest, said[1:])


def our_commands(text: str) -> Iterator[list[str]]:
    """The arguments of every call of ssd-export in a block of shell commands."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            if word == "cli.py" or (word == "ssd-export" and index == 0):
                yield words[index + 1 :]
                break


def parse(arguments: list[str]) -> None:
    """Raises: click.UsageError for a verb or option that the command line does not have."""
    verb, *rest = arguments
    command = ssd_export.get_command(click.Context(ssd_export), verb)
    if command is None:
        raise click.UsageError(f"no verb {verb}")
    context = click.Context(command, info_name=verb, **ssd_export.context_settings)
    command.make_parser(context).parse_args(list(rest))
