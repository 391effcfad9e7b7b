"""One measurement of bench: a bundle, its profile, or transformers at one batch, in this
process.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.config import GRID, NUM_IMAGE_TOKENS
from ssd_export.errors import UserError
from ssd_export.model.prompt import PromptEncoder
from ssd_export.policy.table import PolicyTable
from ssd_export.report.environment import device_memory_bytes
from ssd_export.runtime.generate import TextEmbeddings, open_runner
from ssd_export.runtime.runner import PromptBatch, Runner, Sampling, release_steps
from ssd_export.runtime.uniforms import uniforms

PROMPT = "a red circle on white"
CFG_SCALE = 5.0
SHORT_SECONDS = (
    2.0  # a picture that is decoded faster is decoded twice: the first time opens the graph
)
StepProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cell:
    """kind: rates, bundle, profile (of a bundle) or transformers; path: of the bundle or the
    checkpoint.

    picture_seconds: what the image decoder takes for one picture, where that is known already.
    """

    kind: str
    path: Path | None
    runner: str
    provider: str
    batch: int
    steps: int
    threads: int
    picture_seconds: float | None = None


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
    bundle = open_bundle(cell.path)
    runner = open_runner(bundle, cell.runner, cell.provider, cell.threads)
    try:
        make_batch = _batches(bundle, cell.batch)
        warm_up(runner, make_batch())
        facts = {"load_seconds": time.perf_counter() - began}
        began = time.perf_counter()
        batch = make_batch()
        runner.prefill(batch)
        runner.tokens()
        facts["first_token_ms"] = 1000 * (time.perf_counter() - began)
        # by itself, because a runner opens again for it what it closed for the prompt's sake
        facts["first_step_seconds"] = _seconds(lambda: (runner.decode_step(1), runner.tokens()))
        facts |= step_figures(time_steps(bundle, runner, batch, cell, progress), cell.batch)
        facts["cache_bytes"] = runner.cache_bytes()
        facts["peak_resident_bytes"] = peak_resident_bytes()
        if device_before is not None:
            facts["device_bytes"] = (device_memory_bytes() or 0) - device_before
        facts |= picture_figures(lambda: runner.decode_image(runner.tokens()[:1]), facts, cell)
    finally:
        runner.close()
    return facts


def on_device(cell: Cell) -> bool:
    return cell.provider == "cuda" or cell.runner == "trt"


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


def _batches(bundle: Bundle, batch: int) -> Callable[[], PromptBatch]:
    """Makes the batch of one prompt: tokenizing and looking up embeddings are part of the time to
    the first token.
    """
    encoder, embeddings = (
        PromptEncoder.from_file(bundle.file("tokenizer.json")),
        TextEmbeddings(bundle),
    )
    table, randoms = PolicyTable.from_dict(bundle.config["policy"]), uniforms(0, batch)

    def make() -> PromptBatch:
        encoded = encoder.encode([PROMPT] * batch, table.prompt_slots)
        return PromptBatch(
            embeddings(encoded.ids), encoded.prompt_length, randoms, Sampling(CFG_SCALE, 1.0)
        )

    return make


def warm_up(runner: Runner, batch: PromptBatch) -> None:
    """Opens every graph and touches every buffer once."""
    runner.prefill(batch)
    for step in (1, 2):
        runner.decode_step(step)
    runner.tokens()


@dataclass(frozen=True)
class StepTimes:
    """Of each step: seconds that passed, and seconds that this process computed, on all its threads
    together.

    The two are equal (times the threads) on a quiet machine; where something else computes, the
    first is longer.
    """

    seconds: list[float]
    cpu_seconds: list[float]


def time_steps(
    bundle: Bundle, runner: Runner, batch: PromptBatch, cell: Cell, progress: StepProgress
) -> StepTimes:
    """The time of each decode step; on a device, where steps are queued, of each grid row's steps,
    shared evenly.

    They are the last steps of a picture, over caches that hold less: the work of a step does not
    depend on how much of the cache is filled, only releases do.
    """
    releases = release_steps(PolicyTable.from_dict(bundle.config["policy"]), batch.lengths.tolist())
    times, before = StepTimes([], []), NUM_IMAGE_TOKENS - 1 - cell.steps
    for first in range((before + 1) // GRID * GRID, NUM_IMAGE_TOKENS, GRID):
        row = range(max(before + 1, first), first + GRID)
        parts = [row] if on_device(cell) else [range(step, step + 1) for step in row]
        for part in parts:
            cpu_began = time.process_time()
            spent = _seconds(
                lambda part=part: (
                    runner.decode_row(part, releases),
                    on_device(cell) and runner.tokens(),
                )
            )
            times.seconds.extend([spent / len(part)] * len(part))
            times.cpu_seconds.extend([(time.process_time() - cpu_began) / len(part)] * len(part))
        progress(row.stop - 1 - before, cell.steps)
    return times


def step_figures(times: StepTimes, batch: int) -> dict[str, Any]:
    return {
        "steps": len(times.seconds),
        "ms_per_token": 1000 * statistics.median(times.seconds),
        "ms_per_token_p95": 1000 * float(np.percentile(times.seconds, 95)),
        "cpu_ms_per_token": 1000 * statistics.median(times.cpu_seconds),
        "image_tokens_per_second": batch / statistics.fmean(times.seconds),
    }


def picture_figures(
    decode: Callable[[], object], facts: dict[str, Any], cell: Cell
) -> dict[str, Any]:
    """The image decoder's time for one picture, and what that makes of whole pictures a minute."""
    seconds, measured = cell.picture_seconds, {}
    if seconds is None:
        seconds = _seconds(decode)
        if seconds < SHORT_SECONDS:
            seconds = _seconds(decode)
        measured = {"peak_resident_bytes_with_decoder": peak_resident_bytes()}
    a_step = cell.batch / facts["image_tokens_per_second"]
    steps = facts.get("first_step_seconds", a_step) + (NUM_IMAGE_TOKENS - 2) * a_step
    whole = facts["first_token_ms"] / 1000 + steps + cell.batch * seconds
    return {
        "picture_decoder_seconds": seconds,
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

    bundle = open_bundle(cell.path)
    with tempfile.TemporaryDirectory(prefix="ssd-export-profile-") as folder:
        runner = OrtRunner(bundle, cell.provider, cell.threads, profile=Path(folder) / "profile")
        batch = _batches(bundle, cell.batch)()
        runner.prefill(batch)
        time_steps(bundle, runner, batch, cell, progress)
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
