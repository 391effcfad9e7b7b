"""A few moments of the quick verbs; `python -m tests.interruption.moments` tries 50 of each."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interruption.moments import CODES, SIGNALS, Count, Ended, _judge, names
from tests.interruption.verbs import WritingVerb

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals (POSIX)")
ROOT = Path(__file__).parents[2]
INT, TERM, KILL = SIGNALS


def judged(tmp_path: Path, digest: object, code: int, said: str = "", how: object = INT) -> str:
    verb = WritingVerb("x", lambda inputs, folder: [], digest, kept=("kept",))
    return _judge(
        verb, tmp_path, Ended(code, said, 0.0), how, "wanted", set(), {"out"}, Count("x", 1.0)
    )


def test_what_a_finding_is(tmp_path: Path) -> None:
    def broken(folder: Path) -> str:
        raise ValueError("half a file")

    absent, whole, other = (lambda folder, found=found: found for found in (None, "wanted", "x"))
    for how in SIGNALS:
        assert judged(tmp_path, absent, CODES[how], how=how) == ""
    assert judged(tmp_path, whole, 0) == ""
    assert judged(tmp_path, absent, 1) == "exit code 1"
    assert judged(tmp_path, absent, -999, "it hung") == "exit code -999"
    assert judged(tmp_path, absent, 130, "Traceback (most recent call last)") == "a traceback"
    assert judged(tmp_path, broken, 130).startswith("a broken result (ValueError: half")
    assert judged(tmp_path, other, 130) == "another result than undisturbed"
    (tmp_path / "kept").touch()
    (tmp_path / ".building-x").touch()
    assert judged(tmp_path, absent, 130) == "left behind: .building-x"
    assert judged(tmp_path, absent, CODES[KILL], how=KILL) == ""
    assert names(tmp_path) == {"kept", ".building-x"}


@pytest.mark.slow
def test_a_few_moments(tmp_path: Path) -> None:
    out = tmp_path / "moments.json"
    command = (
        *(sys.executable, "-m", "tests.interruption.moments", "--verbs", "export,calibrate"),
        *("--moments", "6", "--seed", str(random.Random(0).randrange(99)), "--out", str(out)),
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["results"]["rows"]
    assert [row["verb"] for row in rows] == ["export", "calibrate"]
    assert all(row["interrupted"] + row["finished_before"] == 6 for row in rows)
    assert all(row["given_again"] == 2 and row["interrupted"] for row in rows)
