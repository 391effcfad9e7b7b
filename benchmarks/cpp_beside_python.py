"""The C++ library beside Python on the same bundle, in turns: time of a token, peak memory.

    cmake -S engines -B BUILD -DSSD_RUNTIME_TESTS=ON ... && cmake --build BUILD
    python -m benchmarks.cpp_beside_python --build BUILD [--bundle DIR] [--rounds 9]

A round runs both, each in a process that generates one batch to open the graphs and a second one
that is timed: a grid row after the other, image decoder left out. Both use ONNX Runtime on one
thread, C++ the library that it was linked with. The ratio is the median over the rounds of C++ to
the Python run beside it; tokens must be equal. Peak memory is that of the process (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured_process import peak_bytes
from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle
from ssd_export.report.measurement import measurement, table, write_measurement

OUT = Path("docs/measurements/cpp_beside_python.json")
PROMPT = "a red circle above a blue square on white"
CASES: dict[str, dict[str, int]] = {
    "one image": {"num_images": 1},
    "four images": {"num_images": 4},
    "one image, lookahead 8": {"num_images": 1, "lookahead": 8},
}
COLUMNS = (
    "case",
    "rounds",
    "C++ ms a token",
    "Python ms a token",
    "C++ / Python",
    "C++ peak MB",
    "Python peak MB",
)


@dataclass(frozen=True)
class Run:
    """One process: seconds of a token of every image, peak bytes, the tokens."""

    seconds: float
    peak_bytes: int
    tokens: list[list[int]]


def of_rows(times: Sequence[float], width: int) -> float:
    """Seconds of a token: the median row but the first, which has the prefill, and the last, which
    has the image decoder.
    """
    rows = [after - before for before, after in zip(times, times[1:])][:-1]
    return statistics.median(rows) / width


def run_cpp(program: Path, bundle: Path, options: dict[str, int]) -> Run:
    """A batch by the C++ library. Raises: SystemExit where it fails."""
    case = {"bundle": str(bundle), "prompts": [PROMPT], "num_threads": 1, **options}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "cases.json", Path(folder) / "results.bin"
        asked.write_text(json.dumps([case, case]))
        done = subprocess.run([program, asked, answered])
        if done.returncode:
            raise SystemExit(f"{program} failed with exit code {done.returncode}")
        with answered.open("rb") as file:
            for _ in range(2):
                facts = json.loads(file.readline())
                if "error" in facts:
                    raise SystemExit(f"{program}: {facts['error']}")
                stored = memoryview(file.read(4 * facts["tokens"])).cast("i").tolist()
                file.read(facts["pixels"])
    each = len(stored) // facts["images"]
    tokens = [stored[start : start + each] for start in range(0, len(stored), each)]
    rows = facts["row_seconds"]
    return Run(of_rows(rows, each // len(rows)), 1024 * facts["peak_kilobytes"], tokens)


def run_python(bundle: Path, options: dict[str, int]) -> Run:
    """A batch by Python, in a process like the other."""
    command = [sys.executable, "-m", "benchmarks.cpp_beside_python", "--generate", str(bundle)]
    done = subprocess.run([*command, json.dumps(options)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed with exit code {done.returncode}")
    return Run(**json.loads(done.stdout))


def generate(bundle: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What run_python runs: figures of this process."""
    from ssd_export.runtime.generate import ImageGenerator

    with ImageGenerator.from_bundle(bundle, "ort", num_threads=1) as generator:
        for _ in range(2):
            times: list[float] = []
            tokens: list[list[int]] = []
            for event in generator.stream([PROMPT], **options):
                times.append(time.perf_counter())
                tokens = event.tokens.tolist() if event.done else tokens
        width = generator.config.grid.width
    return {"seconds": of_rows(times, width), "peak_bytes": peak_bytes(), "tokens": tokens}


def case_row(
    name: str, options: dict[str, int], program: Path, bundle: Path, rounds: int
) -> list[Any]:
    """A row of the table. Raises: SystemExit where the tokens differ."""
    pairs = []
    for number in range(rounds):
        asked = {**options, "seed": number}
        if number % 2:  # each is the first in half of the rounds
            python, cpp = run_python(bundle, asked), run_cpp(program, bundle, asked)
        else:
            cpp, python = run_cpp(program, bundle, asked), run_python(bundle, asked)
        if cpp.tokens != python.tokens:
            raise SystemExit(f"{name}, seed {number}: the tokens differ")
        pairs.append((cpp, python))
    ms = [round(1000 * statistics.median(one.seconds for one in runs), 3) for runs in zip(*pairs)]
    peaks = [round(max(one.peak_bytes for one in runs) / 1e6) for runs in zip(*pairs)]
    ratio = statistics.median(cpp.seconds / python.seconds for cpp, python in pairs)
    return [name, rounds, *ms, f"{ratio:.2f}", *peaks]


@contextmanager
def bundle_of(given: Path | None) -> Iterator[Path]:
    """The bundle that was given, or one of the demo model that lasts as long as the block."""
    if given is not None:
        yield given
        return
    with temporary_bundle(PolicyChoice()) as path:
        yield path


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build", type=Path, help="build folder of engines/, with its tests")
    parser.add_argument("--bundle", type=Path, help="[default: the demo's, exported here]")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", action="append", choices=list(CASES), help="[default: all]")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--generate", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.generate:
        bundle, options = asked.generate
        print(json.dumps(generate(Path(bundle), json.loads(options))))
        return
    if asked.build is None:
        parser.error("--build DIR: the build folder of engines/, made with -DSSD_RUNTIME_TESTS=ON")
    program = asked.build.absolute() / "tests" / "ssd_cases"
    command = shlex.join(["python", "-m", "benchmarks.cpp_beside_python", *sys.argv[1:]])
    with bundle_of(asked.bundle) as bundle:
        rows = []
        for name in asked.case or CASES:
            rows.append(case_row(name, CASES[name], program, bundle.absolute(), asked.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    tables = [table("C++ beside Python, ONNX Runtime on one thread", COLUMNS, rows)]
    write_measurement(asked.out, measurement(command, {"tables": tables}, asked.note))


if __name__ == "__main__":
    main()
