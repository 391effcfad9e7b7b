"""A probe may crash, hang, print or fail in any way: it is an answer, never the caller's fault."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from ssd_export.doctor.child import ask
from ssd_export.doctor.probes import Facts
from ssd_export.errors import UserError


def facts(name: str) -> Facts:
    print("noise on stdout", flush=True)
    os.write(2, b"noise of a native library\n")
    return {"name": name}


def refused() -> Facts:
    raise UserError("this needs a GPU")


def missing() -> Facts:
    import onnxruntime_of_another_world  # noqa: F401

    return {}


def failing() -> Facts:
    raise ZeroDivisionError("division by zero\nwith a second line")


def aborting() -> Facts:
    os.kill(os.getpid(), signal.SIGABRT)
    return {}


def leaving() -> Facts:
    os._exit(7)


def hanging() -> Facts:
    time.sleep(600)
    return {}


def test_facts_come_back_and_noise_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    answer = ask(facts, "x")
    assert answer.works and answer.facts == {"name": "x"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "probe, problem",
    [
        (refused, "this needs a GPU"),
        (
            missing,
            f"onnxruntime_of_another_world is not installed for {sys.executable}: {sys.executable}"
            " -m pip install ssd-export",
        ),
        (failing, "ZeroDivisionError: division by zero"),
        (aborting, "its process ended with SIGABRT"),
        (leaving, "its process ended with exit code 7"),
    ],
)
def test_every_end_is_one_line(probe: object, problem: str) -> None:
    answer = ask(probe)
    assert not answer.works and answer.problem == problem


def test_what_hangs_is_ended() -> None:
    began = time.monotonic()
    assert ask(hanging, seconds=0.2).problem == "no answer within 0 s"
    assert time.monotonic() - began < 60
