"""TensorRT's progress as calls `progress(stage, done, total)`, and the one way to stop a build that
is under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from threading import Event
from typing import Any

Progress = Callable[[str, int, int], None]
SECONDS_BEFORE_SHOWN = 1.0


@dataclass
class Phases:
    """Reports the phases that take a while and have steps; outer and short ones are left out.

    label: what stands before the phase, say the graph. cancelled: set from any thread, it stops the
    build.
    """

    label: str
    progress: Progress
    cancelled: Event
    clock: Callable[[], float] = time.monotonic
    _running: dict[str, tuple[int, float]] = field(default_factory=dict)
    _parents: set[str] = field(default_factory=set)
    _shown: set[str] = field(default_factory=set)

    def start(self, phase: str, parent: str | None, num_steps: int) -> None:
        """Hears from the builder that a phase begins."""
        if parent is None:
            self._parents.add(phase)
        elif num_steps > 1:
            self._parents.add(parent)
        self._running[phase] = num_steps, self.clock()

    def step(self, phase: str, step: int) -> bool:
        """Whether to go on."""
        num_steps, started = self._running.get(phase, (0, 0.0))
        if (
            phase not in self._parents
            and step + 1 < num_steps
            and self.clock() - started >= SECONDS_BEFORE_SHOWN
        ):
            self._shown.add(phase)
            self.progress(self._stage(phase), step + 1, num_steps)
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        """Hears from the builder that a phase ends."""
        num_steps, _ = self._running.pop(phase, (0, 0.0))
        self._parents.discard(phase)
        if phase in self._shown:
            self._shown.discard(phase)
            self.progress(self._stage(phase), num_steps, num_steps)

    def _stage(self, phase: str) -> str:
        return f"{self.label}: {phase[:1].lower()}{phase[1:]}"


def progress_monitor(trt: Any, phases: Phases) -> Any:
    """The IProgressMonitor that tells phases; hold on to it while the build runs."""
    return _monitor_class(trt)(phases)


@cache
def _monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self, phases: Phases) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = phases

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor
