"""Runs this project's bundle under ONNX Runtime: whole decode steps, with guidance, sampler and
evictions.

    python -m benchmarks.peers.ours BUNDLE NUM_IMAGES NUM_THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.protocol import serve
from ssd_export.bundle import open_bundle
from ssd_export.policy.schedule import eviction_steps
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.prompt_batch import PromptBatches, bundle_sampling

PROMPT = "a red circle above a blue square on white, painted in the manner of the old masters"
FIRST_STEP = 289  # half an image is there


def open_model(bundle: Path, num_images: int, num_threads: int) -> Callable[[], object]:
    """A decode step of this many images, of the second half of an image."""
    opened = open_bundle(bundle)
    runner = OrtRunner(opened, num_threads=num_threads)
    batch = PromptBatches.from_bundle(opened)(
        [PROMPT] * num_images, bundle_sampling(opened), seed=0
    )
    table = opened.config.policy
    runner.prefill(batch)
    evictions = eviction_steps(table, batch.lengths.tolist())
    # What the caches hold decides no time: every slot is read, and every due release made.
    steps = iter(range(FIRST_STEP, table.grid.num_tokens))

    def take() -> None:
        step = next(steps)
        runner.decode_row(range(step, step + 1), evictions)

    return take


if __name__ == "__main__":
    serve(lambda: open_model(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
