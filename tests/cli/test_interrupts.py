"""Ctrl-C and SIGTERM while a destructor runs end the command as they do elsewhere."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from ssd_export.cli import main as module
from ssd_export.cli.main import main


class Interrupted:
    """An object that a signal meets in its destructor."""

    def __init__(self, signum: signal.Signals) -> None:
        self.signum = signum

    def __del__(self) -> None:
        signal.raise_signal(self.signum)
        time.sleep(0)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_in_a_destructor_is_not_lost(
    signum: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object, **__: object) -> int:
        gone = Interrupted(signum)
        del gone
        time.sleep(60)
        return 0

    monkeypatch.setattr(module.ssd_export, "main", work)
    hook, handler, began = sys.unraisablehook, signal.getsignal(signal.SIGTERM), time.monotonic()
    try:
        with pytest.raises(SystemExit) as ended:
            main([])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == code and time.monotonic() - began < 30
    assert "Traceback" not in capfd.readouterr().err
    assert sys.unraisablehook is hook


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_else_a_destructor_raises_goes_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("in a destructor")

    def work(*_: object, **__: object) -> int:
        gone = Failing()
        del gone
        return 3

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    monkeypatch.setattr(module.ssd_export, "main", work)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 3 and [args.exc_type for args in seen] == [ValueError]
