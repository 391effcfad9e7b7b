"""Files with anything wrong in them: one line, soon, and nothing outside is touched or run.

A few hundred inputs of each target; `make fuzz` goes on for hours, guided by coverage.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.errors import UserError
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.watch import MOST_LETTERS, FindingError, read_watched

FOUND = Path(__file__).parent / "found"
SLOW = ("checkpoint_config", "ssd_generation", "tokenizer", "pickle")  # 10 to 60 ms an input
REFUSED_WHOLE = {
    "results",
    "targets_toml",
}  # one of the seeds: cut off, of a target without engines


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_pass(name: str) -> None:
    """A target that refuses everything would find nothing."""
    messages = [read_watched(TARGETS[name], whole) for whole in TARGETS[name].seeds()]
    assert "" in messages, messages
    assert not any(messages) or name in REFUSED_WHOLE, messages


@pytest.mark.parametrize("name", TARGETS)
def test_wrong_files_end_in_one_line(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    @settings(max_examples=60 if name in SLOW else 250)
    @given(number=st.integers(0, 2**64 - 1))
    def read(number: int) -> None:
        random = Random(number)
        content = mutate(random, random.choice(seeds), random.choice(seeds), target.is_json)
        read_watched(target, content)

    read()


@pytest.mark.parametrize("path", sorted(FOUND.glob("*")), ids=lambda path: path.name)
def test_what_was_found_once_stays_mended(path: Path) -> None:
    """Inputs of former findings, by the name of their target."""
    read_watched(TARGETS[path.name.split("-")[0]], path.read_bytes())


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    def finding(read: object) -> str:
        with pytest.raises((FindingError, ZeroDivisionError)) as error:
            read_watched(Target("x", read, lambda: []), b"")
        return str(error.value)

    outside = tmp_path / "outside"
    outside.write_text("secret")
    assert "open" in finding(lambda folder, content: outside.read_text())
    assert "open" in finding(lambda folder, content: (folder / "../x").write_text("out"))
    assert "os.system" in finding(lambda folder, content: os.system("true"))
    assert "division" in finding(lambda folder, content: 1 // 0)

    def at_length(folder: Path, content: bytes) -> None:
        raise UserError("a" * (MOST_LETTERS + 1))

    assert "not one short line" in finding(at_length)
