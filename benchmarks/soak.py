"""Generates many images in one process, then opens and closes a bundle many times: memory,
descriptors and threads stay level, the time of an image steady.

    python -m benchmarks.soak [--bundle DIR] [--images 1000] [--batch 4] [--cycles 200]
    [--out FILE.json]

A cycle opens the bundle, generates one grid row, leaves the stream and closes. The slope is the
median of the slopes between all pairs of samples (Theil and Sen), after a warm-up: allocators grow
in steps, which a least-squares line would call a leak or hide one behind.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_export.bundle import resolve_bundle
from ssd_export.errors import UserError
from ssd_export.machine import resident_bytes
from ssd_export.report.environment import busy_note
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.generate import ImageGenerator

PROMPTS = ("a red circle on white", "three green squares on gray", "blue", "a ring above a star")
WARM_UP_SHARE = 0.2  # of the samples: pools and caches fill once
# Over a whole part of the soak. A leaked cache of one image is 2 MB, its pixels are 27 KB: 1,000 of
# the smaller are 27 MB.
MOST_GROWTH_BYTES = 4 << 20
MOST_GROWTH_COUNT = 0.5  # of descriptors or threads: none is leaked
MOST_SLOWER = 0.1  # of the time of an image, from the first to the last


@dataclass(frozen=True)
class Sample:
    """State after a call: resident bytes, descriptors, threads, CPU seconds of an image."""

    resident: float
    descriptors: float
    threads: float
    seconds: float


def sample(seconds: float) -> Sample:
    """State of this process now. Raises: UserError where /proc is not there."""
    try:
        descriptors, threads = (
            len(list(Path("/proc/self", name).iterdir())) for name in ("fd", "task")
        )
    except OSError as error:
        raise UserError(f"soak reads /proc ({error}); run it on Linux") from error
    return Sample(resident_bytes(), descriptors, threads, seconds)


def images(path: Path, num_images: int, batch: int) -> Iterator[Sample]:
    """One generator, a call for each batch, other prompts and seeds each time."""
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        for number in range(num_images // batch):
            began = time.process_time()
            generator([PROMPTS[number % 4]], seed=number, num_images=batch, max_batch=batch)
            yield sample((time.process_time() - began) / batch)


def cycles(path: Path, count: int) -> Iterator[Sample]:
    """A generator for each cycle, left in the middle of an image."""
    for number in range(count):
        began = time.process_time()
        with ImageGenerator.from_bundle(path, num_threads=1) as generator:
            stream = generator.stream([PROMPTS[number % 4]], seed=number)
            next(iter(stream))
            stream.close()
        del generator, stream
        gc.collect()
        yield sample(time.process_time() - began)


def slope(values: Sequence[float]) -> float:
    """The median slope a sample between all pairs of samples after the warm-up."""
    kept = values[int(len(values) * WARM_UP_SHARE) :]
    slopes = [
        (kept[late] - kept[early]) / (late - early)
        for early in range(len(kept))
        for late in range(early + 1, len(kept))
    ]
    return statistics.median(slopes) if slopes else 0.0


def judged(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Growth over all samples by the slope, and whether each is within its limit."""
    count = len(samples)
    growth = {
        field: slope([getattr(one, field) for one in samples]) * count
        for field in ("resident", "descriptors", "threads", "seconds")
    }
    median = statistics.median(one.seconds for one in samples)
    level = {
        "resident": growth["resident"] <= MOST_GROWTH_BYTES,
        "descriptors": growth["descriptors"] <= MOST_GROWTH_COUNT,
        "threads": growth["threads"] <= MOST_GROWTH_COUNT,
        "seconds": growth["seconds"] <= MOST_SLOWER * median,
    }
    return {
        "part": name,
        "samples": count,
        "resident_mib": samples[-1].resident / 2**20,
        "growth": growth,
        "cpu_ms": 1000 * median,
        "level": level,
        "ok": all(level.values()),
    }


def results_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Table and figures for the documents."""
    cells = [
        [
            part["part"],
            f"{part['resident_mib']:.0f}",
            f"{part['growth']['resident'] / 2**20:+.2f}",
            f"{part['growth']['descriptors']:+.1f}",
            f"{part['growth']['threads']:+.1f}",
            f"{part['cpu_ms']:.0f}",
            f"{100 * part['growth']['seconds'] / (part['cpu_ms'] / 1000):+.1f} %",
            "yes" if part["ok"] else "no",
        ]
        for part in parts
    ]
    columns = ["what", "resident MiB", "growth MiB", "descriptors", "threads", "CPU ms", "slower"]
    note = (
        "Growth over the whole part by the median slope of all pairs of samples after the first"
        f" fifth; level: at most {MOST_GROWTH_BYTES >> 20} MiB, no descriptor, no thread,"
        f" {100 * MOST_SLOWER:.0f} % of CPU time. CPU ms: of an image, or of a cycle."
    )
    return {
        "parts": list(parts),
        "tables": [table("Soak", [*columns, "level"], cells, note)],
        "figures": {"level": "yes" if all(part["ok"] for part in parts) else "no"},
    }


def main() -> int:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(description="Generates for long and watches what grows.")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a measurement for the documents")
    asked = parser.parse_args()
    note = busy_note()
    try:
        path = resolve_bundle(asked.bundle)
        parts = []
        for name, samples in (
            (
                f"{asked.images:,} images in batches of {asked.batch}",
                images(path, asked.images, asked.batch),
            ),
            (f"{asked.cycles:,} open and close", cycles(path, asked.cycles)),
        ):
            parts.append(judged(name, list(samples)))
            print(parts[-1], flush=True)
        if asked.out:
            command = (
                f"python -m benchmarks.soak --images {asked.images} --batch {asked.batch}"
                f" --cycles {asked.cycles}"
            )
            write_measurement(asked.out, measurement(command, results_of(parts), note))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all(part["ok"] for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
