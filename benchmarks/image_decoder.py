"""Times the image decoder in float32 and in int8, with the operators of engines/operators and
without, in turns in one process, on the CPU.

    python -m benchmarks.image_decoder BUNDLE [--threads 1] [--rounds 5] [--tokens FILE.npy]
    python -m benchmarks.image_decoder --shape janus-pro-1b [--out FILE.json]

BUNDLE is exported with --decoder-weights int8; without --tokens its image is random codes. --shape
takes random weights of a published shape, calibrated on two grids of random codes: times are those
of the real model, with no convolution after a doubling in float32 and with all of them; decibels
are not. Prints CPU and wall seconds, the ratio of each turn's and its range, and the PSNR. What
needs the library of operators is left out where it is not built.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.bundle import open_bundle
from ssd_export.bundle.graphs import FUSED
from ssd_export.config import ModelConfig
from ssd_export.metrics.similarity import psnr
from ssd_export.model.families import PUBLISHED
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.ort_operators import find_operators
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.runtime.ort_session import open_session

FLOAT, WITH_OPERATORS = "float32", ", operators"
Decode = Callable[[np.ndarray], np.ndarray]
COLUMNS = ("decoder", "CPU s an image", "times as fast by CPU time", "range", "by the clock")


def compare(decoders: Mapping[str, Decode], codes: np.ndarray, rounds: int) -> dict[str, Any]:
    """Figures of each decoder by name. codes: int32 [1, image tokens]."""
    images = {name: decode(codes)[0].astype(np.uint8) for name, decode in decoders.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decode in decoders.items():
            turns[name].append(_seconds(partial(decode, codes)))
    found: dict[str, Any] = {}
    for name, own in turns.items():
        clocks = {}
        for place, clock in enumerate(("cpu", "wall")):
            ratios = [slow[place] / fast[place] for slow, fast in zip(turns[FLOAT], own)]
            clocks[f"{clock}_s"] = statistics.median(turn[place] for turn in own)
            clocks[f"{clock}_times_as_fast"] = statistics.median(ratios)
            clocks[f"{clock}_range"] = [min(ratios), max(ratios)]
        found[name] = clocks | {"psnr": psnr(images[FLOAT], images[name])}
    return found


def of_bundle(path: Path, num_threads: int) -> dict[str, Decode]:
    """Both decoders of a bundle. Raises: SystemExit where it has none in int8 for this machine."""
    opened = open_bundle(path)
    fast = OrtRunner(opened, num_threads=num_threads, uses_operators=False)
    if not fast.decodes_in_int8:
        raise SystemExit(f"{path} does not decode in int8 here: see the warning, or export again")
    found = {
        FLOAT: OrtRunner(opened, num_threads=num_threads, exact=True).decode_image,
        "int8": fast.decode_image,
    }
    fused = OrtRunner(opened, num_threads=num_threads)
    if fused.decodes_by_operators:
        found[f"int8{WITH_OPERATORS}"] = fused.decode_image
    return found


def of_shape(shape: str, folder: Path, num_threads: int) -> dict[str, Decode]:
    """Decoders of a published shape with random weights, written into a folder."""
    import torch

    from ssd_export.export.decoder_ranges import measure_ranges
    from ssd_export.export.int8_decoder import write_int8_decoder
    from ssd_export.model.image_decoder import ImageDecoder

    config = PUBLISHED[shape]
    torch.manual_seed(0)
    decoder = ImageDecoder(config).eval().requires_grad_(False)
    grids = np.concatenate([random_codes(config, seed) for seed in (1, 2)])
    ranges = measure_ranges(decoder, grids)
    kept = frozenset(name for name in ranges if name.endswith(".upsample.conv"))
    found = {
        FLOAT: _decode_with(_write_float_decoder(folder, config, decoder.state_dict()), num_threads)
    }
    operators = find_operators()
    for name, own in (("int8", frozenset[str]()), ("int8, doublings float32", kept)):
        place = folder / f"{len(own)}-kept"
        place.mkdir()
        path = write_int8_decoder(place, config, decoder.state_dict(), ranges, own)[1]
        found[name] = _decode_with(path, num_threads)
        if operators is not None:
            fused = path.with_name(f"{path.stem}{FUSED}.onnx")
            found[f"{name}{WITH_OPERATORS}"] = _decode_with(fused, num_threads, operators)
    return found


def _write_float_decoder(folder: Path, config: ModelConfig, tensors: dict[str, Any]) -> Path:
    """The float decoder as an export writes it, beside a weights file that holds it alone."""
    import onnx_ir as ir

    from ssd_export.export.image_decoder_writer import write_image_decoder
    from ssd_export.export.onnx_writer import GraphWriter
    from ssd_export.export.weights import WEIGHTS_FILE, Weight
    from ssd_export.policy.make import make_policy

    weights, places, end = {}, {}, 0
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for name, tensor in tensors.items():
            length = file.write(tensor.numpy().tobytes())
            weights[name] = Weight(name, tuple(tensor.shape), tensor.dtype, tensor.clone)
            places[name], end = (end, length), end + length
    table = make_policy("full", config, budget=1.0)
    spec, model = write_image_decoder(GraphWriter(config, table, FLOAT, weights, places))
    ir.save(model, folder / f"{spec.name}.onnx")
    return folder / f"{spec.name}.onnx"


def random_codes(config: ModelConfig, seed: int) -> np.ndarray:
    """A grid of random codes, int32 [1, image tokens]."""
    shape = (1, config.grid.num_tokens)
    return np.random.RandomState(seed).randint(config.codebook_size, size=shape).astype(np.int32)


def _decode_with(path: Path, num_threads: int, operators: Path | None = None) -> Decode:
    session = open_session(path, "cpu", num_threads, operators=operators)
    return lambda codes: session.run(["pixels"], {"codes": codes})[0]


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of all threads, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def results_of(figures: dict[str, Any], what: str, num_threads: int, rounds: int) -> dict[str, Any]:
    """Table and figures of a measurement, a row for each decoder."""
    rows = [
        [
            name,
            f"{one['cpu_s']:.2f}",
            f"{one['cpu_times_as_fast']:.2f}",
            "{:.2f} to {:.2f}".format(*one["cpu_range"]),
            f"{one['wall_times_as_fast']:.2f}",
        ]
        for name, one in figures.items()
    ]
    note = f"{what}; {num_threads} thread, medians of {rounds} rounds in turns."
    named = f"int8{WITH_OPERATORS}"
    return {
        "tables": [table("The image decoder", COLUMNS, rows, note)],
        "figures": {
            key: f"{figures[name]['cpu_times_as_fast']:.1f}"
            for key, name in (("int8", "int8"), ("int8-operators", named))
            if name in figures
        },
    }


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--shape", choices=sorted(PUBLISHED))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=Path, metavar="FILE.npy")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    spec = parser.parse_args()
    if (spec.bundle is None) == (spec.shape is None):
        parser.error("give a BUNDLE or a --shape")
    with tempfile.TemporaryDirectory() as folder:
        if spec.shape is None:
            config = open_bundle(spec.bundle).config.model
            decoders = of_bundle(spec.bundle, spec.threads)
        else:
            config = PUBLISHED[spec.shape]
            decoders = of_shape(spec.shape, Path(folder), spec.threads)
        codes = random_codes(config, 0) if spec.tokens is None else np.load(spec.tokens)[:1]
        figures = compare(decoders, codes.astype(np.int32), spec.rounds)
    print(json.dumps({"threads": spec.threads, **figures}, indent=1))
    if spec.out is not None:
        command = shlex.join(["python", "-m", "benchmarks.image_decoder", *sys.argv[1:]])
        what = "the bundle's" if spec.shape is None else f"random weights of {spec.shape}'s shape"
        results = results_of(figures, what, spec.threads, spec.rounds)
        write_measurement(spec.out, measurement(command, results))


if __name__ == "__main__":
    main()
