"""Times the image decoder in float32 and in int8, in turns in one process, on the CPU.

    python -m benchmarks.image_decoder BUNDLE [--threads 1] [--rounds 5] [--tokens FILE.npy]

BUNDLE is exported with --decoder-weights int8. Prints CPU and wall seconds of each turn, their
ratio, and the PSNR of the pixels; without --tokens the image is random codes. At Janus-Pro-1B's
shape, with random weights, calibrated on random codes:

    python -m benchmarks.synthetic_checkpoint --shape janus-pro-1b --num-layers 1 CHECKPOINT
    python -c "import numpy as np; np.save('CODES.npy',
        np.random.RandomState(0).randint(16384, size=(20, 576)))"
    python cli.py export --model CHECKPOINT --decoder-weights int8 --decoder-samples CODES.npy
        --out BUNDLE
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import open_bundle
from ssd_export.metrics.similarity import psnr
from ssd_export.runtime.ort_runner import OrtRunner


def compare(
    bundle: Path, num_threads: int, rounds: int, tokens: np.ndarray | None
) -> dict[str, Any]:
    """Seconds of both decoders by turn, the median of the turns' ratios, and the PSNR."""
    opened = open_bundle(bundle)
    model = opened.config.model
    if tokens is None:
        shape = (1, model.grid.num_tokens)
        tokens = np.random.RandomState(0).randint(model.codebook_size, size=shape)
    tokens = tokens[:1].astype(np.int32)
    runners = {
        "float32": OrtRunner(opened, num_threads=num_threads, exact=True),
        "int8": OrtRunner(opened, num_threads=num_threads),
    }
    if not runners["int8"].decodes_in_int8:
        raise SystemExit(f"{bundle} does not decode in int8 here: see the warning, or export again")
    images = {name: runner.decode_image(tokens)[0] for name, runner in runners.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            turns[name].append(_seconds(lambda runner=runner: runner.decode_image(tokens)))
    pairs = list(zip(turns["float32"], turns["int8"], strict=True))
    ratios = {
        kind: [slow[place] / fast[place] for slow, fast in pairs]
        for place, kind in enumerate(("cpu", "wall"))
    }
    return {
        "threads": num_threads,
        "cpu_s": {name: statistics.median(cpu for cpu, _ in one) for name, one in turns.items()},
        "wall_s": {name: statistics.median(wall for _, wall in one) for name, one in turns.items()},
        "times_as_fast": {kind: statistics.median(found) for kind, found in ratios.items()},
        "range": {kind: [min(found), max(found)] for kind, found in ratios.items()},
        "psnr": psnr(images["float32"], images["int8"]),
    }


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of all threads, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=Path, metavar="FILE.npy")
    spec = parser.parse_args()
    tokens = None if spec.tokens is None else np.load(spec.tokens)
    print(json.dumps(compare(spec.bundle, spec.threads, spec.rounds, tokens), indent=1))


if __name__ == "__main__":
    main()
