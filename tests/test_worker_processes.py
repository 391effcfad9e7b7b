"""Parts run on several processes; one that fails, or is killed, does not take the others with
it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ssd_export.errors import UserError
from ssd_export.worker_processes import Outcome, Tell, Work, run_parts

PATIENCE = 300  # seconds, for a machine that is busy with other things


class Writes:
    """Work that writes what it was asked to, and by whom."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, part: str, tell: Tell) -> None:
        tell(1, 2)
        if part == "refuse":
            raise UserError("no; use another")
        if part == "fail":
            raise ZeroDivisionError("by zero")
        if part == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if part.startswith("talk"):
            (self._folder / f"pid-{os.getpid()}").touch()
            for count in range(24000):
                time.sleep(0.05)
                tell(count, 24000)
        (self._folder / part).write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")


def results(
    parts: list[str], jobs: int, open_work: partial[Work]
) -> tuple[dict[str, Outcome], list[tuple[str, int, int]]]:
    ends: dict[str, Outcome] = {}
    told: list[tuple[str, int, int]] = []
    run_parts(parts, jobs, open_work, lambda *args: told.append(args), ends.__setitem__)
    return ends, told


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_part_ends_as_it_did(
    tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ends, told = results(["a", "refuse", "b", "fail", "c"], jobs, partial(Writes, tmp_path))
    assert ends == {
        "a": Outcome(),
        "b": Outcome(),
        "c": Outcome(),
        "refuse": Outcome(refused="no; use another"),
        "fail": Outcome(failed="ZeroDivisionError: by zero"),
    }
    assert sorted(told) == [(part, 1, 2) for part in sorted(ends)]
    written = [(tmp_path / name).read_text().split() for name in "abc"]
    assert {threads for _, threads in written} == {"1"}
    assert all((int(pid) == os.getpid()) == (jobs == 1) for pid, _ in written)


def test_a_process_that_is_killed_is_replaced(tmp_path: Path) -> None:
    ends, _ = results(["die", "a", "die", "b", "c"], 2, partial(Writes, tmp_path))
    assert "exit code -9" in ends["die"].failed and "use fewer --jobs" in ends["die"].failed
    assert [ends[name] for name in "abc"] == [Outcome()] * 3 and len(list(tmp_path.iterdir())) == 3


SCRIPT = """
import signal, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_worker_processes import Writes
from ssd_export.worker_processes import run_parts
if __name__ == "__main__":
    # A shell that runs the tests in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_parts(["talk1", "talk2", "c"], 2, partial(Writes, Path({folder!r})), print, print)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_work(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C reaches all of them; of a parent that is killed they hear when they next say
    something.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parent.parent), folder=str(tmp_path)))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = _wait(lambda: [int(path.name[4:]) for path in tmp_path.glob("pid-*")], 2)
    if how is signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    assert process.wait(PATIENCE) != 0
    _wait(lambda: [pid for pid in children if not _is_alive(pid)], 2)
    assert not (tmp_path / "c").exists()


def _wait(found: Callable[[], list[int]], count: int) -> list[int]:
    until = time.monotonic() + PATIENCE
    while len(now := found()) < count:
        assert time.monotonic() < until, "nothing happened for five minutes"
        time.sleep(0.05)
    return now


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
