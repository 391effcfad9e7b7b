"""Fuzzes every parsed file, guided by coverage where atheris is installed; `make fuzz` calls it.

    python -m tests.fuzz.run [--seconds 60] [--targets NAME,...] [--out FILE.json]
    python -m tests.fuzz.run --target NAME --input FILE         one input again

Each target runs in a separate process with a limit on memory. Without atheris (its wheels are for
few versions of Python) inputs are mutated without knowing what they reach, and the table says so.
An input that is a finding is kept in build/fuzz/NAME and the exit code is 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from ssd_export.report.measurement import measurement, table, write_measurement

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "fuzz"
MEMORY_MIB = 4096  # of a target's process, torch and all: an input that makes it grow is a finding
INPUT_SECONDS = 30  # of one input, after which libFuzzer calls it a hang


def has_atheris() -> bool:
    """Whether inputs can be guided by coverage here."""
    return find_spec("atheris") is not None


def fuzz_guided(name: str, seconds: int) -> None:
    """Runs libFuzzer over a target in this process and ends it."""
    import atheris

    with atheris.instrument_imports(include=["ssd_export"]):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.mutate import MOST_BYTES, mutate
    from tests.fuzz.watch import read_watched

    target = TARGETS[name]
    seeds = target.seeds()
    corpus = KEPT / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def change(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        if random.random() < 0.5:
            return atheris.Mutate(data, most)
        return mutate(random, data, random.choice(seeds), target.is_json)[:most]

    def one_input(data: bytes) -> None:
        read_watched(target, data)

    limits = [
        f"-max_total_time={seconds}",
        f"-max_len={MOST_BYTES}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-timeout={INPUT_SECONDS}",
        f"-artifact_prefix={KEPT / name}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one_input, custom_mutator=change)
    atheris.Fuzz()


def fuzz_blind(name: str, seconds: int) -> None:
    """Mutates whole files until the time is over, or something is found."""
    from tests.fuzz.mutate import mutate
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import read_watched

    target = TARGETS[name]
    seeds, began, number = target.seeds(), time.monotonic(), 0
    while time.monotonic() - began < seconds:
        random = Random(number)
        content = mutate(random, random.choice(seeds), random.choice(seeds), target.is_json)
        try:
            read_watched(target, content)
        except BaseException:
            (KEPT / name).mkdir(parents=True, exist_ok=True)
            (KEPT / name / f"crash-{number}").write_bytes(content)
            traceback.print_exc()
            break
        number += 1
    print(f"stat::number_of_executed_units: {number}", file=sys.stderr)


def fuzz(name: str, seconds: int) -> dict[str, Any]:
    """Runs a target in a separate process; what it did."""
    before = set((KEPT / name).glob("*-*"))
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz.run", "--child", name, "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    said = done.stderr + done.stdout
    count = re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)
    edges = re.findall(r"cov: (\d+)", said)
    findings = sorted(str(path) for path in set((KEPT / name).glob("*-*")) - before)
    if done.returncode and not findings:
        findings = [f"ended with exit code {done.returncode}"]
    if findings:
        print(said[-3000:], file=sys.stderr)
    return {
        "target": name,
        "inputs": int(count[-1]) if count else 0,
        "seconds": time.monotonic() - began,
        "edges": int(edges[-1]) if edges else None,
        "findings": findings,
    }


def results_of(rows: list[dict[str, Any]], seconds: int) -> dict[str, Any]:
    """Table and figures for the documents."""
    how = "atheris, guided by coverage" if has_atheris() else "mutation without coverage"
    cells = [
        [row["target"], f"{row['inputs']:,}", f"{row['seconds'] / 3600:.2f}", len(row["findings"])]
        for row in rows
    ]
    total, hours = sum(row["inputs"] for row in rows), sum(row["seconds"] for row in rows) / 3600
    note = (
        f"{how}; {seconds} s a target, memory at most {MEMORY_MIB} MiB, an input {INPUT_SECONDS} s."
    )
    return {
        "rows": rows,
        "tables": [table("Fuzzing", ["target", "inputs", "hours", "findings"], cells, note)],
        "figures": {
            "inputs": f"{total:,}",
            "hours": f"{hours:.1f}",
            "targets": str(len(rows)),
            "findings": str(sum(len(row["findings"]) for row in rows)),
        },
    }


def main() -> int:
    """Runs what the module describes."""
    parser = argparse.ArgumentParser(description="Fuzzes every parsed file.")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--targets", help="names, by commas; default: all")
    parser.add_argument("--target", help="of --input")
    parser.add_argument("--input", type=Path, help="one input to read again")
    parser.add_argument("--out", type=Path, help="a measurement for the documents")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        (fuzz_guided if has_atheris() else fuzz_blind)(asked.child, asked.seconds)
        return 0
    from tests.fuzz.targets import TARGETS

    if asked.input:
        from tests.fuzz.watch import read_watched

        print(read_watched(TARGETS[asked.target], asked.input.read_bytes()) or "no error")
        return 0
    rows = []
    for name in asked.targets.split(",") if asked.targets else TARGETS:
        rows.append(fuzz(name, asked.seconds))
        print(
            f"{name}: {rows[-1]['inputs']:,} inputs in {rows[-1]['seconds']:.0f} s,"
            f" {len(rows[-1]['findings'])} findings",
            flush=True,
        )
    if asked.out:
        command = f"python -m tests.fuzz.run --seconds {asked.seconds}"
        write_measurement(asked.out, measurement(command, results_of(rows, asked.seconds)))
    return 1 if any(row["findings"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
