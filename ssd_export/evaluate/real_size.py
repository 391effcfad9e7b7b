"""Measures export and drawing at real size, each step in a process of its own: seconds and the peak of resident memory.

    python -m ssd_export.evaluate.synthetic_checkpoint --shape janus-pro-1b CHECKPOINT
    python -m ssd_export.evaluate.real_size export --label "1B fp16" CHECKPOINT BUNDLE --dtype fp16
    python -m ssd_export.evaluate.real_size draw --label "1B fp16" --tokens 24 BUNDLE

Every call adds its figures to docs/measurements/real_size.json (--json) and makes the tables there anew. `draw` opens
the bundle, checks every file, and draws the first --tokens of one picture with ONNX Runtime on the CPU; with all 576, or
with --decode, the picture is decoded too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_export.config import NUM_IMAGE_TOKENS
from ssd_export.evaluate.measurement import measurement, read_measurement, table, write_measurement

JSON = Path("docs/measurements/real_size.json")
COMMAND = "python -m ssd_export.evaluate.real_size (its docstring has the steps)"
PROMPT = "a red circle above a blue square on white"
# The command line, and then its peak of resident memory in the file that the first argument names.
COMMAND_LINE = """
import sys
from pathlib import Path
from ssd_export.cli.main import main
from ssd_export.evaluate.real_size import peak_bytes
report = Path(sys.argv.pop(1))
try:
    main()
finally:
    report.write_text(str(peak_bytes()))
"""
GB = 1e9


def run_measured(arguments: Sequence[str]) -> dict[str, float]:
    """Runs the command line in a process of its own: {"seconds", "peak_bytes"}. Raises: SystemExit where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        report, began = Path(folder) / "peak", time.perf_counter()
        done = subprocess.run([sys.executable, "-c", COMMAND_LINE, str(report), *arguments])
        if done.returncode:
            raise SystemExit(f"ssd-export {' '.join(arguments)} failed with exit code {done.returncode}")
        return {"seconds": time.perf_counter() - began, "peak_bytes": int(report.read_text())}


def peak_bytes() -> int:
    """Of this process since it began: what getrusage says counts the process that started it too (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_export(checkpoint: Path, bundle: Path, options: Sequence[str]) -> dict[str, Any]:
    """An export by the command line, and the size of what it wrote."""
    figures: dict[str, Any] = run_measured(["export", "--model", str(checkpoint), "--out", str(bundle), *options])
    figures["bundle_bytes"] = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    figures["options"] = " ".join(options)
    return figures


def measure_drawing(bundle: Path, num_tokens: int, num_threads: int, decode: bool) -> dict[str, Any]:
    """Opens the bundle and draws in this process, whose memory is measured: run it in one of its own."""
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.runtime.runner import Sampling, release_steps
    from ssd_export.runtime.uniforms import uniforms

    began = time.perf_counter()
    with ImageGenerator.from_bundle(bundle, num_threads=num_threads) as generator:
        batch = generator._batch([PROMPT], uniforms(0, 1), Sampling(5.0, 1.0))
        generator.runner.prefill(batch)
        figures = {"seconds_to_first_token": time.perf_counter() - began, "peak_bytes_first_token": peak_bytes()}
        figures["cache_bytes"] = generator.runner.cache_bytes()
        releases, seconds = release_steps(generator.table, batch.lengths.tolist()), []
        for step in range(1, num_tokens):
            started = time.perf_counter()
            if step in releases:
                generator.runner.evict(step)
            generator.runner.decode_step(step)
            seconds.append(time.perf_counter() - started)
        if seconds:
            figures["ms_per_token"] = 1000 * sorted(seconds)[len(seconds) // 2]
            figures["peak_bytes_tokens"] = peak_bytes()
        if decode:
            started = time.perf_counter()
            generator.runner.decode_image(generator.runner.tokens())
            figures["seconds_image_decoder"] = time.perf_counter() - started
        figures["peak_bytes"] = peak_bytes()
    return figures | {"tokens": num_tokens, "num_threads": num_threads}


def tables(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of all that was measured so far."""
    exports = [
        [label, f"`{row['options']}`", f"{row['seconds']:.0f}", _gb(row["peak_bytes"]), _gb(row["bundle_bytes"])]
        for label, row in results.get("exports", {}).items()
    ]
    drawings = [
        [label, f"{row['seconds_to_first_token']:.0f}", _gb(row["peak_bytes_first_token"]),
         f"{row['ms_per_token']:.0f}" if "ms_per_token" in row else None, row["tokens"],
         f"{row['seconds_image_decoder']:.1f}" if "seconds_image_decoder" in row else None, _gb(row["peak_bytes"]),
         f"{row['cache_bytes'] / 1e6:.1f}"]
        for label, row in results.get("drawings", {}).items()
    ]  # fmt: skip
    return [
        table("Export", ["checkpoint", "options", "seconds", "peak GB", "bundle GB"], exports, "one run each"),
        table(
            "One picture with ONNX Runtime on the CPU",
            ["bundle", "seconds to first token", "peak GB then", "ms per token (median)", "tokens drawn",
             "image decoder, seconds", "peak GB", "cache MB"],
            drawings, "one run each; the time to the first token holds the check of every file",
        ),
    ]  # fmt: skip


def record(path: Path, kind: str, label: str, figures: dict[str, Any], note: str) -> None:
    """Adds figures to the measurement in a file."""
    measured = read_measurement(path)
    results = measured["results"] if measured else {}
    results.setdefault(kind, {})[label] = figures
    results["tables"] = tables(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_measurement(path, measurement(COMMAND, results, note))


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--note", default="")
    verbs = parser.add_subparsers(dest="verb", required=True)
    export = verbs.add_parser("export")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("bundle", type=Path)
    export.add_argument("options", nargs=argparse.REMAINDER, help="of ssd-export export")
    draw = verbs.add_parser("draw")
    draw.add_argument("bundle", type=Path)
    draw.add_argument("--tokens", type=int, default=NUM_IMAGE_TOKENS)
    draw.add_argument("--threads", type=int, default=2)
    draw.add_argument("--decode", action="store_true", help="decode the picture however few tokens are drawn")
    for verb in (export, draw):
        verb.add_argument("--label", required=True)
    spec = parser.parse_args()
    if spec.verb == "export":
        figures = measure_export(spec.checkpoint, spec.bundle, spec.options)
    else:
        figures = measure_drawing(spec.bundle, spec.tokens, spec.threads, spec.decode or spec.tokens == NUM_IMAGE_TOKENS)
    record(spec.json, f"{spec.verb}s" if spec.verb == "export" else "drawings", spec.label, figures, spec.note)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
