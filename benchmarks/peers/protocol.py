"""The protocol by which a peer's process is asked for decode steps: a count a line on stdin, a JSON
object a line on stdout.

Processes stay open between rounds, so that all peers take turns within one run and other work on
the machine falls on each of them alike. Standard library only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

WARM_UP = 3


def serve(open_model: Callable[[], Callable[[], object]]) -> None:
    """Opens the model, then takes steps as asked until stdin ends.

    Args: open_model: returns the function that takes one decode step.
    Prints: {"open_cpu_s"}, then for each count {"cpu_ms", "wall_ms", "peak_mb"}, a list each.
    """
    began = time.process_time()
    step = open_model()
    for _ in range(WARM_UP):
        step()
    _answer({"open_cpu_s": time.process_time() - began})
    for line in sys.stdin:
        cpu, wall = [], []
        for _ in range(int(line)):
            wall_began, cpu_began = time.perf_counter(), time.process_time()
            step()
            cpu.append(1e3 * (time.process_time() - cpu_began))
            wall.append(1e3 * (time.perf_counter() - wall_began))
        _answer({"cpu_ms": cpu, "wall_ms": wall, "peak_mb": _peak_mb()})


def _answer(facts: dict[str, object]) -> None:
    print(json.dumps(facts), flush=True)


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e3
