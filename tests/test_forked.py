"""A forked Python does what `python` does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import forked_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere none forks")

TELL = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ["OF_THIS_TEST"], __name__, sys.stdin.read()]))
print("to stderr", file=sys.stderr)
print([name for name in sys.modules if name.split(".")[0] == "ssd_export"], "torch" in sys.modules)
import beside
"""


def ran(python: list[str], *arguments: str, cwd: Path, text: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [*python, *arguments],
        cwd=cwd,
        env=os.environ | {"OF_THIS_TEST": text, "PYTHONPATH": str(cwd / "more")},
        input=text,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("kind", [("-c", TELL), ("-m", "tell"), ("more/tell.py",)])
def test_streams_folder_environment_and_arguments(kind: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tell.py").write_text(TELL)
    (tmp_path / "more" / "beside.py").write_text("print('imported')")
    both = [
        ran(python, *kind, "one", "--two", cwd=tmp_path, text="x\ny")
        for python in (forked_python(), [sys.executable])
    ]
    assert both[0] == (0, both[1][1].replace("[] False", "[] True"), "to stderr\n")
    assert json.loads(both[0][1].splitlines()[0])[2:] == ["x\ny", "__main__", "x\ny"]
    assert both[0][1].splitlines()[1:] == ["[] True", "imported"]


def test_every_end(tmp_path: Path) -> None:
    python = forked_python()
    ends = {
        "raise SystemExit(7)": 7,
        "import sys; sys.exit('why')": 1,
        "import os; os._exit(9)": 9,
        "import os; os.kill(os.getpid(), 9)": -9,
        "1 / 0": 1,
    }
    for code, wanted in ends.items():
        found, _, said = ran(python, "-c", code, cwd=tmp_path)
        assert found == wanted, code
        assert ("ZeroDivisionError" in said) == (code == "1 / 0")
    left = "import atexit; atexit.register(print, 'left'); print('ends')"
    assert ran(python, "-c", left, cwd=tmp_path)[1] == "ends\nleft\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_it(number: signal.Signals) -> None:
    code = "import time; print('here', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [*forked_python(), "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    interrupted = number is signal.SIGINT
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in said) == interrupted
