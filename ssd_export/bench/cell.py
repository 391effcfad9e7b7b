"""One measurement of bench: a bundle, its profile, or transformers at one batch, in this
process.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.config import Grid
from ssd_export.errors import UserError
from ssd_export.model.families import family_of
from ssd_export.report.environment import device_memory_bytes
from ssd_export.runtime.loop import decode, grid_rows, single_steps
from ssd_export.runtime.prompt_batch import PromptBatch, PromptBatches, bundle_sampling
from ssd_export.runtime.runner import Runner
from ssd_export.runtime.runners import find_runner, open_runner

WARM_UP_TOKENS = 3  # the prefill and two steps: every graph is opened, every buffer touched
SHORT_SECONDS = (
    2.0  # an image that is decoded faster is decoded twice: the first time opens the graph
)
StepProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cell:
    """One thing to measure. kind: rates, bundle, profile (of a bundle) or transformers; path: of
    the bundle or the checkpoint.

    image_seconds: what the image decoder takes for one image, where that is known already.
    lookahead: of whole images.
    """

    kind: str
    path: Path | None
    runner: str
    provider: str
    batch: int
    steps: int
    threads: int
    image_seconds: float | None = None
    lookahead: int | str = 1


def measure(cell: Cell, progress: StepProgress) -> dict[str, Any]:
    """The figures of a cell, measured in this process. Raises: UserError for what the runner or
    checkpoint lacks.
    """
    if cell.kind == "rates":
        return _rates(cell)
    if cell.kind == "transformers":
        from ssd_export.bench.transformers_baseline import measure_transformers

        return measure_transformers(cell, progress)
    if cell.kind == "profile":
        return {"profile": _profile(cell, progress)}
    began = time.perf_counter()
    device_before = device_memory_bytes() if on_device(cell) else None
    assert cell.path is not None
    bundle = open_bundle(cell.path)
    runner = open_runner(bundle, cell.runner, cell.provider, cell.threads)
    try:
        table, batches = bundle.config.policy, _batches(bundle, cell)
        for _ in decode(runner, batches(), table, single_steps(WARM_UP_TOKENS)):
            runner.tokens()
        facts = {"load_seconds": time.perf_counter() - began}
        began = time.perf_counter()
        # The first step by itself: a runner opens again for it what it closed for the prompt.
        loop = decode(runner, batches(), table, [*single_steps(2), *timed_parts(cell, table.grid)])
        next(loop)
        runner.tokens()
        facts["first_token_ms"] = 1000 * (time.perf_counter() - began)
        facts["first_step_seconds"] = _seconds(lambda: (next(loop), runner.tokens()))
        facts |= step_figures(time_steps(loop, runner, cell, table.grid, progress), cell.batch)
        facts["cache_bytes"] = runner.cache_bytes()
        facts["peak_resident_bytes"] = peak_resident_bytes()
        if device_before is not None:
            facts["device_bytes"] = (device_memory_bytes() or 0) - device_before
        one = runner.tokens()[:1]
        facts |= image_figures(lambda: runner.decode_image(one), facts, cell, one.shape[1])
    finally:
        runner.close()
    return facts


def on_device(cell: Cell) -> bool:
    """Whether the cell computes on a GPU."""
    return find_runner(cell.runner).provider(cell.provider) == "cuda"


def _rates(cell: Cell) -> dict[str, Any]:
    from ssd_export.bench.roofline import measure_cpu, measure_cuda

    if not on_device(cell):
        return measure_cpu(cell.threads).to_dict()
    try:
        return measure_cuda("float16").to_dict()
    except (ImportError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"the GPU's bandwidth is measured with torch for CUDA ({error}); pip install torch for"
            " your CUDA"
        ) from error


def _batches(bundle: Bundle, cell: Cell) -> Callable[[], PromptBatch]:
    """Makes the batch of one prompt: tokenizing and looking up embeddings are part of the time to
    the first token.
    """
    batches = PromptBatches.from_bundle(bundle)
    model, sampling = bundle.config.model, bundle_sampling(bundle)
    (prompt,) = family_of(model).example_prompts(model, 1)
    return lambda: batches([prompt] * cell.batch, sampling, seed=0)


@dataclass(frozen=True)
class StepTimes:
    """Elapsed seconds of each step, and seconds that this process computed, on all its threads
    together.

    The two are equal (times the threads) on a quiet machine; where something else computes, the
    first is longer.
    """

    seconds: list[float]
    cpu_seconds: list[float]


def timed_parts(cell: Cell, grid: Grid) -> list[range]:
    """The last steps of an image, over caches that hold less: the work of a step does not depend on
    how much of the cache is filled, only evictions do.

    One by one; on a device, where steps are queued, a grid row at a time.
    """
    first = grid.num_tokens - cell.steps
    return grid_rows(grid, first) if on_device(cell) else single_steps(grid.num_tokens, first)


def time_steps(
    loop: Iterator[range], runner: Runner, cell: Cell, grid: Grid, progress: StepProgress
) -> StepTimes:
    """The time of each decode step of a loop over timed_parts; on a device a grid row's time is
    shared evenly among its steps.
    """
    times = StepTimes([], [])
    for _ in timed_parts(cell, grid):
        began, cpu_began = time.perf_counter(), time.process_time()
        steps = next(loop)
        if on_device(cell):
            runner.tokens()  # waits for the device
        times.seconds.extend([(time.perf_counter() - began) / len(steps)] * len(steps))
        times.cpu_seconds.extend([(time.process_time() - cpu_began) / len(steps)] * len(steps))
        if steps.stop % grid.width == 0:
            progress(len(times.seconds), cell.steps)
    return times


def step_figures(times: StepTimes, batch: int) -> dict[str, Any]:
    """Milliseconds a token, wall and CPU, from the times of steps."""
    return {
        "steps": len(times.seconds),
        "ms_per_token": 1000 * statistics.median(times.seconds),
        "ms_per_token_p95": 1000 * float(np.percentile(times.seconds, 95)),
        "cpu_ms_per_token": 1000 * statistics.median(times.cpu_seconds),
        "image_tokens_per_second": batch / statistics.fmean(times.seconds),
    }


def image_figures(
    decode: Callable[[], object], facts: dict[str, Any], cell: Cell, num_tokens: int
) -> dict[str, Any]:
    """The image decoder's time for one image, and what that makes of whole images a minute."""
    seconds, measured = cell.image_seconds, {}
    if seconds is None:
        seconds = _seconds(decode)
        if seconds < SHORT_SECONDS:
            seconds = _seconds(decode)
        measured = {"peak_resident_bytes_with_decoder": peak_resident_bytes()}
    a_step = cell.batch / facts["image_tokens_per_second"]
    steps = facts.get("first_step_seconds", a_step) + (num_tokens - 2) * a_step
    whole = facts["first_token_ms"] / 1000 + steps + cell.batch * seconds
    return {
        "image_decoder_seconds": seconds,
        "images_per_minute": 60 * cell.batch / whole,
        **measured,
    }


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _profile(cell: Cell, progress: StepProgress) -> list[dict[str, Any]]:
    from ssd_export.bench.profile import summarise
    from ssd_export.runtime.ort_runner import OrtRunner

    assert cell.path is not None
    bundle = open_bundle(cell.path)
    with tempfile.TemporaryDirectory(prefix="ssd-export-profile-") as folder:
        runner = OrtRunner(bundle, cell.provider, cell.threads, profile=Path(folder) / "profile")
        table = bundle.config.policy
        loop = decode(runner, _batches(bundle, cell)(), table, timed_parts(cell, table.grid))
        next(loop)
        time_steps(loop, runner, cell, table.grid, progress)
        return summarise(runner.end_profiling(), cell.steps)


def peak_resident_bytes() -> int:
    """The most memory this process has had resident, mapped files included."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak << 10
