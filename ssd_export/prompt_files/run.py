"""All images of a file of prompts, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ssd_export.errors import UserError
from ssd_export.prompt_files.results import Results
from ssd_export.prompt_files.tasks import ImageTask
from ssd_export.prompt_files.worker import Outcome, OverlappedImages
from ssd_export.runtime.generate import ImageGenerator, Progress
from ssd_export.runtime.prompt_batch import ImageRequest

MAX_FAILURES_IN_A_ROW = 16  # in the making: the fault is not the images' then
CHECKING_PROMPTS, GENERATING = "checking the prompts", "generating images"
Check = Callable[[Sequence[ImageRequest]], object]


@dataclass
class Summary:
    """Counts of how the images of a file ended. already: made by an earlier run; failed: with the
    reason.
    """

    already: int = 0
    done: int = 0
    failed: list[Outcome] = field(default_factory=list)


class Ledger:
    """Takes outcomes as they come: writes them, counts them, says how far it is."""

    def __init__(self, results: Results, progress: Progress) -> None:
        self.summary = Summary()
        self._results, self._progress = results, progress
        self._total = self._ended = self._failures_in_a_row = 0

    def pending(self, tasks: Sequence[ImageTask], check: Check) -> list[ImageTask]:
        """The images that are left to make. Those that cannot be asked for fail here; check: raises
        UserError for them.
        """
        pending: list[ImageTask] = []
        for count, task in enumerate(tasks, 1):
            if self._results.has(task):
                self.summary.already += 1
            else:
                try:
                    check([task.request])
                    pending.append(task)
                except UserError as error:
                    self._fail(Outcome(task, error=str(error)))
            self._progress(CHECKING_PROMPTS, count, len(tasks))
        self._total = len(pending)
        return pending

    def __call__(self, outcome: Outcome) -> None:
        """Records how an image ended. Raises: UserError where it cannot be written, or one image
        after the other fails.
        """
        if outcome.error:
            self._fail(outcome)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise UserError(
                    f"{MAX_FAILURES_IN_A_ROW} images failed one after the other, the last one:"
                    f" {outcome.error}; mend that and run the same command again"
                )
        else:
            self._failures_in_a_row = 0
            self._results.done(outcome.task, outcome.png)
            self.summary.done += 1
        self._ended += 1
        self._progress(GENERATING, self._ended, self._total)

    def _fail(self, outcome: Outcome) -> None:
        self._results.failed(outcome.task, outcome.error)
        self.summary.failed.append(outcome)


def run_here(
    generator: ImageGenerator,
    tasks: Sequence[ImageTask],
    batch: int,
    results: Results,
    progress: Progress,
    lookahead: int | str = 1,
) -> Summary:
    """Makes the images that are left, in full batches; a batch's pixels beside the tokens of the
    next.

    Raises: UserError where results cannot be written, or nothing works any more.
    """
    ledger = Ledger(results, progress)
    pending = ledger.pending(tasks, generator.check_requests)
    size = min(batch, generator.runner.max_images)
    with OverlappedImages(generator, ledger, lookahead) as images:
        for start in range(0, len(pending), size):
            images.make(pending[start : start + size])
        images.finish()
    return ledger.summary
