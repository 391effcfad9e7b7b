"""Ctrl-C and SIGTERM that arrive while a destructor runs: Python prints what is raised there and
goes on, so they are sent once more.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

RAISED_BY = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
PAUSE = 0.01  # seconds, in which a destructor ends


@contextmanager
def heard_in_destructors() -> Iterator[None]:
    """While the block runs, an interruption that a destructor swallows reaches the main thread
    after it.
    """
    before = sys.unraisablehook

    def send_again(unraisable: sys.UnraisableHookArgs) -> None:
        signum = RAISED_BY.get(unraisable.exc_type)
        if signum is None:
            before(unraisable)
        else:  # not by threading, whose locks the main thread may hold
            _thread.start_new_thread(_signal_main_thread, (signum,))

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _signal_main_thread(signum: signal.Signals) -> None:
    time.sleep(PAUSE)
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signum)
