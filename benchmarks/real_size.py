"""Measures export and generation at real size and writes docs/measurements/real_size.json.

    python -m benchmarks.real_size FOLDER [--only LABEL ...]

Random checkpoints of the published shapes and their bundles are written to FOLDER, one bundle at a
time; with 7B that takes 28 GB of disk and 15 GB of memory. With --only the other rows stay as they
were measured. Every export and every generation is a separate process (measured_run.py) with one
thread: two wait for each other where anything else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured_process import measure_export, measure_generation, process_bytes
from benchmarks.synthetic_checkpoint import write_checkpoint
from ssd_export.report.environment import load_average
from ssd_export.report.measurement import measurement, read_measurement, table, write_measurement

JSON = Path("docs/measurements/real_size.json")
COMMAND = "python -m benchmarks.real_size FOLDER"
GB = 1e9


@dataclass(frozen=True)
class Case:
    """One export, and what is generated from it: {label: arguments of measured_run}."""

    label: str
    shape: str
    layout: str
    options: str
    generations: dict[str, str]


CASES = (
    Case("1B fp32", "janus-pro-1b", "transformers", "--dtype fp32", {"1B fp32": "--tokens 24"}),
    Case(
        "1B fp16",
        "janus-pro-1b",
        "transformers",
        "--dtype fp16",
        {
            "1B fp16": "--tokens 24 --widen at-once",
            "1B fp16, widened on use": "--tokens 12 --widen on-use",
        },
    ),
    Case(
        "1B int8",
        "janus-pro-1b",
        "transformers",
        "--dtype fp32 --weights int8",
        {"1B int8": "--tokens 24"},
    ),
    Case(
        "1B int4",
        "janus-pro-1b",
        "transformers",
        "--dtype fp32 --weights int4",
        {
            "1B int4, a whole image": "--tokens 576",
            "1B int4, four images decoded at once": "--tokens 2 --decoder-batch 4",
        },
    ),
    Case("1B original fp32", "janus-pro-1b", "original", "--dtype fp32", {}),
    Case("1B original fp16", "janus-pro-1b", "original", "--dtype fp16", {}),
    Case("1B original int8", "janus-pro-1b", "original", "--dtype fp32 --weights int8", {}),
    Case("1B original int4", "janus-pro-1b", "original", "--dtype fp32 --weights int4", {}),
    Case("7B fp16", "janus-pro-7b", "transformers", "--dtype fp16", {"7B fp16": "--tokens 3"}),
    Case(
        "7B int4",
        "janus-pro-7b",
        "transformers",
        "--dtype fp16 --weights int4",
        {"7B int4": "--tokens 8"},
    ),
)


def measure(case: Case, folder: Path, path: Path) -> None:
    """Writes the checkpoint where it is missing, exports, generates, and adds each figure to the
    file as it is measured.
    """
    checkpoint = folder / f"{case.shape}-{case.layout}"
    if not (checkpoint / "tokenizer.json").exists():  # the last file that is written
        write_checkpoint(checkpoint, case.shape, case.layout, "fp16", seed=0)
    bundle = folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    load, process = load_average(), process_bytes()
    figures = measure_export(checkpoint, bundle, case.options.split())
    record(
        path,
        "exports",
        case.label,
        {
            "options": case.options,
            "layout": case.layout,
            "load": load,
            "process_bytes": process,
            **figures,
        },
    )
    for label, arguments in case.generations.items():
        load = load_average()
        record(
            path,
            "generations",
            label,
            {"of": case.label, "load": load, **measure_generation(bundle, arguments.split())},
        )
    shutil.rmtree(bundle)


def record(path: Path, kind: str, label: str, figures: dict[str, Any]) -> None:
    """Adds a row to the measurement in a file and makes its tables anew, rows in the order of
    CASES.
    """
    measured = read_measurement(path)
    results = measured["results"] if measured else {}
    rows = {**results.get(kind, {}), label: figures}
    order = {
        "exports": [case.label for case in CASES],
        "generations": [name for case in CASES for name in case.generations],
    }[kind]
    results = {**results, kind: {name: rows[name] for name in order if name in rows}}
    exports, generations = results.get("exports", {}), results.get("generations", {})
    results |= {"tables": tables(exports, generations), "figures": figures_of(exports, generations)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_measurement(path, measurement(COMMAND, results))
    print(json.dumps({label: figures}), flush=True)


def tables(exports: dict[str, Any], generations: dict[str, Any]) -> list[dict[str, Any]]:
    """Tables of all exports and generations; a case that was not measured says so."""
    export_rows = [
        [
            case.label,
            case.layout,
            f"`{case.options}`",
            *_cells(
                exports.get(case.label),
                (
                    ("seconds", 1, "{:.0f}"),
                    ("peak_bytes", GB, "{:.2f}"),
                    ("bundle_bytes", GB, "{:.2f}"),
                    ("load", 1, "{:.1f}"),
                ),
            ),
        ]
        for case in CASES
    ]
    generation_rows = [
        [
            label,
            *_cells(
                generations.get(label),
                (
                    ("seconds_to_check", 1, "{:.0f}"),
                    ("seconds_to_first_token", 1, "{:.0f}"),
                    ("seconds_to_second_token", 1, "{:.1f}"),
                    ("ms_per_token", 1, "{:.0f}"),
                    ("tokens", 1, "{}"),
                    ("seconds_image_decoder", 1, "{:.1f}"),
                    ("peak_bytes_first_token", GB, "{:.2f}"),
                    ("peak_bytes", GB, "{:.2f}"),
                    ("cache_bytes", 1e6, "{:.1f}"),
                    ("load", 1, "{:.1f}"),
                ),
            ),
        ]
        for case in CASES
        for label in case.generations
    ]
    load = (
        "load: processes that wanted a core in the minute before; where it is above 0.7, other work"
        " made the row slower"
    )
    return [
        table(
            "Export",
            ["checkpoint", "layout", "options", "seconds", "peak GB", "bundle GB", "load"],
            export_rows,
            f"one run each, one thread; {load}.",
        ),
        table(
            "One image with ONNX Runtime on the CPU",
            [
                "bundle",
                "opening, s",
                "first token, s",
                "second token, s",
                "ms a token",
                "tokens",
                "image decoder, s",
                "peak GB at the first token",
                "peak GB",
                "cache MB",
                "load",
            ],
            generation_rows,
            "one run each, one thread. Opening: files that the export has just hashed are not"
            " hashed again. First and second token open a graph each; ms a token is the median of"
            " those after them. Peak: resident, the mapped weights file included where it was"
            f" touched; {load}.",
        ),
    ]


def figures_of(exports: dict[str, Any], generations: dict[str, Any]) -> dict[str, str]:
    """Named numbers for running text: export_7b_int4_peak, generate_7b_int4_peak."""

    def name(label: str) -> str:
        return label.lower().replace(", ", " ").replace(" ", "_")

    peaks = {f"export_{name(label)}_peak": row for label, row in exports.items()}
    peaks |= {f"generate_{name(label)}_peak": row for label, row in generations.items()}
    found = {key: f"{row['peak_bytes'] / GB:.2f} GB" for key, row in peaks.items()}
    return found | {
        f"generate_{name(label)}_ms": f"{row['ms_per_token']:.0f}"
        for label, row in generations.items()
        if "ms_per_token" in row
    }


def _cells(
    row: dict[str, Any] | None, columns: Sequence[tuple[str, float, str]]
) -> list[str | None]:
    """Each value of a row over its unit; None where it was not measured."""
    return [
        (
            None
            if row is None or row.get(name) is None
            else form.format(row[name] / unit if unit != 1 else row[name])
        )
        for name, unit, form in columns
    ]


def main() -> None:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[case.label for case in CASES],
        metavar="LABEL",
        help=f"of {', '.join(case.label for case in CASES)}",
    )
    spec = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for case in CASES:
        if spec.only is None or case.label in spec.only:
            measure(case, spec.folder, spec.json)


if __name__ == "__main__":
    main()
