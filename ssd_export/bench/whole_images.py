"""Whole images of several caches, generated in turns in one process: what a user waits for.

A step timed alone leaves out the prompt, the evictions of a whole image, the image decoder and what
one step leaves in the processor's cache for the next. In turns, a machine that slows down for a
while slows all caches alike, so the ratio of a round is that of the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from ssd_export.bench.cell import Cell, StepProgress
from ssd_export.model.families import family_of
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import bundle_sampling

SMALL_MODEL_ROUNDS = 7  # odd, so that the median is one of them


@dataclass(frozen=True)
class ImageRounds:
    """Rounds of whole images: a batch of each cell, as many times as there are rounds; all cells
    have one batch and one number of threads.
    """

    cells: tuple[Cell, ...]
    rounds: int
    kind: str = "whole images"

    @property
    def threads(self) -> int:
        """CPU threads of every cell."""
        return self.cells[0].threads

    @property
    def batch(self) -> int:
        """Images at once of every cell."""
        return self.cells[0].batch


def measure_images(images: ImageRounds, progress: StepProgress) -> list[dict[str, Any]]:
    """Seconds of a batch in each round, by cell: elapsed, and computed on all threads of this
    process. A first round opens the graphs and is not timed.

    Every other round goes through the cells backwards: none always follows the same. With
    lookahead, passes: the decode passes of each round.
    Raises: UserError for what a runner or the checkpoint lacks.
    """
    with ExitStack() as stack:
        generate = [_opened(cell, stack) for cell in images.cells]
        for one in generate:
            one.generate(0)
        passes: list[list[int]] = [[] for _ in generate]
        times: list[list[tuple[float, float]]] = [[] for _ in generate]
        order = list(range(len(generate)))
        for number in range(images.rounds):
            for index in order if number % 2 == 0 else reversed(order):
                began, cpu_began = time.perf_counter(), time.process_time()
                generate[index].generate(number)
                passed, computed = time.perf_counter() - began, time.process_time() - cpu_began
                times[index].append((passed, computed))
                passes[index].append(generate[index].passes())
            progress(number + 1, images.rounds)
    return [
        _figures(of_cell, images.batch) | ({"passes": own} if cell.lookahead != 1 else {})
        for cell, of_cell, own in zip(images.cells, times, passes, strict=True)
    ]


def _figures(times: list[tuple[float, float]], batch: int) -> dict[str, Any]:
    passed, computed = ([one[clock] for one in times] for clock in (0, 1))
    return {
        "image_rounds": len(times),
        "batch_seconds": passed,
        "batch_cpu_seconds": computed,
        "images_per_minute": 60 * batch / statistics.median(passed),
    }


class _Opened(NamedTuple):
    """An opened cell. generate: one batch of the cell, from a seed; passes: of the batch generated
    last.
    """

    generate: Callable[[int], object]
    passes: Callable[[], int] = lambda: 0


def _opened(cell: Cell, stack: ExitStack) -> _Opened:
    if cell.kind == "transformers":
        from ssd_export.bench.transformers_baseline import open_images

        return _Opened(open_images(cell))
    assert cell.path is not None
    generator = stack.enter_context(
        ImageGenerator.from_bundle(cell.path, cell.runner, cell.provider, cell.threads)
    )
    usual, model = bundle_sampling(generator.bundle), generator.config
    prompts = family_of(model).example_prompts(model, 1)
    return _Opened(
        lambda seed: generator(
            prompts,
            num_images=cell.batch,
            seed=seed,
            cfg_scale=usual.cfg_scale,
            temperature=usual.temperature,
            max_batch=cell.batch,
            lookahead=cell.lookahead,
        ),
        lambda: generator.passes,
    )
