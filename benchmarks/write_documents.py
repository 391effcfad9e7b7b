"""Writes what was measured into the documents; nobody edits a measured number by hand.

    python -m benchmarks.write_documents [--check]

docs/reference/benchmarks.md is written whole from docs/measurements/*.json. In the other documents
the text between two comments is:

    <!-- measured:heads -->                  command, machine, versions and all tables of
    docs/measurements/heads.json <!-- measured:bench-demo.ratio -->8.4    one of its figures, within
    a line <!-- /measured -->

A missing file or figure is written as "not run". --check writes nothing and exits with 1 where a
document differs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_export.bench.report import bench_figures, bench_tables
from ssd_export.errors import UserError
from ssd_export.files import write_file
from ssd_export.report.measurement import NOT_RUN, markdown_table, read_measurement
from ssd_export.sweep.acceptance import goal_figures
from ssd_export.sweep.report import markdown

REPOSITORY = Path(__file__).parent.parent
MEASUREMENTS, BENCHMARKS = Path("docs/measurements"), Path("docs/reference/benchmarks.md")
MARKED = ("README.md", "docs/**/*.md", "plugins/README.md", "ssd_export/demo/*checkpoint/README.md")
REGION = re.compile(
    r"(<!-- measured:([\w-]+)(?:\.([\w.@=-]+))? -->)(.*?)(<!-- /measured -->)", re.DOTALL
)


@dataclass(frozen=True)
class Section:
    """A part of docs/reference/benchmarks.md: heading, what to know, the measurements by name,
    images beside them.
    """

    heading: str
    text: str
    names: tuple[str, ...]
    images: tuple[str, ...] = ()


INTRODUCTION = """# Benchmarks

<!-- written by `python -m benchmarks.write_documents` from docs/measurements/*.json; to change a
number, measure it again -->

Every table stands under the command that made it, with the machine and the versions it ran on.
What was not measured says "not run".
"""

SECTIONS = (
    Section(
        "Quality of the demo model",
        "The share of images that show what captions unseen in training say, judged by "
        "rule, and the teacher-forced loss, for every policy and budget.",
        ("sweep",),
        ("docs/measurements/sweep-pareto.png", "docs/measurements/sweep-sheet.png"),
    ),
    Section(
        "Quality of the class-conditional demo model",
        "The same for a LlamaGen-shaped model (2D RoPE, one condition token): scenes of one to four"
        " equal shapes, of classes unseen in training.",
        ("sweep-classes",),
        ("docs/measurements/sweep-classes-pareto.png", "docs/measurements/sweep-classes-sheet.png"),
    ),
    Section(
        "Speed and memory of the demo model",
        "Both baselines run in the same command: transformers with its own growing "
        "cache, and the pre-allocated full cache in the same runner.",
        ("bench-demo",),
    ),
    Section(
        "Speed and memory at the shape of Janus-Pro-1B",
        "Random weights of the published shape (`python -m"
        " benchmarks.synthetic_checkpoint`): time, memory and bytes are those of the real"
        " model.",
        ("bench-1b-fp32", "bench-1b-int4"),
    ),
    Section(
        "With the library of operators for the CPU",
        "`make operators` builds it; decoder and steps without it are the ordinary ones.",
        ("image_phases", "step_operators", "image_decoder"),
    ),
    Section(
        "Attention of one decode step, full cache against a fifth",
        "",
        ("attention_ratio",),
    ),
    Section(
        "Serving the demo model",
        "A real server in a separate process. Ratios compare what ran in turns with it.",
        ("serve_first_image", "serve_soak", "serve_fuzz", "ray_prompts"),
    ),
    Section(
        "Lookahead",
        "Several tokens of an image in one pass, compared with single steps of the same runner"
        " (ONNX Runtime, one thread).",
        (
            "lookahead",
            "lookahead-equality-full",
            "lookahead-equality-0.2",
            "lookahead-passes",
            "sweep-lookahead",
            "lookahead_real_size",
            "zipar",
        ),
    ),
    Section(
        "The C++ library beside Python",
        "The same bundle, prompts and seeds, in turns; the tokens are equal.",
        ("cpp_beside_python",),
    ),
    Section("Other runtimes on the CPU", "", ("peers",)),
    Section("Export and memory at real size", "", ("real_size",)),
    Section("Quantized weights and caches", "", ("quantization", "precision_divergence")),
    Section("Building engines without a GPU", "", ("build", "target_builds")),
    Section(
        "A decode step on GPUs that are not here",
        "A model, made of bytes, operations and the kernel's machine code; no step of it was run.",
        ("step_model",),
    ),
    Section("On a GPU", "", ("gpu",)),
)


class Measurements:
    """The files of a folder, each read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, dict[str, Any] | None] = {}

    def __getitem__(self, name: str) -> dict[str, Any] | None:
        if name not in self._read:
            self._read[name] = read_measurement(self._folder / f"{name}.json")
        return self._read[name]

    def text(self, name: str) -> str:
        """Command, machine, versions and tables of a measurement in Markdown."""
        measured = self[name]
        if measured is None:
            return f"{name}: **{NOT_RUN}**."
        return "\n\n".join([provenance(measured), *_tables(measured["results"])])

    def figure(self, name: str, figure: str) -> str:
        """A named figure of a measurement as text; "not run" where it is missing."""
        measured = self[name]
        return (
            NOT_RUN if measured is None else str(figures(measured["results"]).get(figure, NOT_RUN))
        )


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Named numbers for running text: those of the file, and of the rows of a bench or a sweep."""
    own = (
        bench_figures(results)
        if "rates" in results
        else sweep_figures(results)
        if "skipped" in results
        else {}
    )
    return {**own, **results.get("figures", {})}


def sweep_figures(results: dict[str, Any]) -> dict[str, str]:
    """The scene score of every policy and budget, POLICY-BUDGET-score, passes and times faster of
    its lookahead modes, POLICY-BUDGET-MODE-passes, what it was measured on, and the goals' figures.
    """
    scores = {
        f"{row['policy']}-{row['budget']:g}-score": f"{100 * row['score']['share']:.1f} %"
        for row in results["rows"]
        if "score" in row
    }
    modes = {
        f"{row['policy']}-{row['budget']:g}-{mode['mode']}": mode
        for row in results["rows"]
        for mode in row.get("lookahead", ())
    }
    return {
        "captions": str(results["settings"]["num_prompts"]),
        **scores,
        **{f"{name}-passes": f"{mode['passes']:.0f}" for name, mode in modes.items()},
        **{f"{name}-times_faster": f"{mode['times_faster']:.1f}" for name, mode in modes.items()},
        **goal_figures(results["rows"]),
    }


def provenance(measured: dict[str, Any]) -> str:
    """The line under a table: machine, device, versions."""
    machine, names = measured["machine"], measured["versions"]
    device = machine["device"] or "no GPU"
    where = (
        f"{machine['cores']} core(s) of {machine['cpu']}, {machine['memory_gib']} GiB, {device},"
        f" {machine['system']}"
    )
    what = ", ".join(f"{name} {version}" for name, version in names.items())
    note = f" {measured['note']}" if measured["note"] else ""
    return f"`{measured['command']}`\n\n{where}; {what}.{note}"


def _tables(results: dict[str, Any]) -> Iterator[str]:
    if "skipped" in results:  # of a sweep
        yield markdown(results).strip()
    made = bench_tables(results) if "rates" in results else []
    for one in [*made, *results.get("tables", [])]:
        yield markdown_table(one)


def benchmarks(root: Path, measured: Measurements) -> str:
    """docs/reference/benchmarks.md."""
    parts = [INTRODUCTION.strip()]
    for section in SECTIONS:
        parts += [
            f"## {section.heading}",
            section.text,
            *(measured.text(name) for name in section.names),
        ]
        if measured[section.names[0]] is not None:
            parts += [
                f"![{Path(name).stem}]({os.path.relpath(name, BENCHMARKS.parent)})"
                for name in section.images
                if (root / name).exists()
            ]
    return "\n\n".join(part for part in parts if part) + "\n"


def fill_regions(text: str, measured: Measurements) -> str:
    """The document with its measured regions written anew."""

    def fill(match: re.Match[str]) -> str:
        begin, name, figure, _, end = match.groups()
        inside = measured.figure(name, figure) if figure else f"\n{measured.text(name)}\n"
        return f"{begin}{inside}{end}"

    return REGION.sub(fill, text)


def documents(root: Path) -> dict[Path, str]:
    """Every document that holds measured text, as it should be. Raises: UserError for a damaged
    measurement.
    """
    measured = Measurements(root / MEASUREMENTS)
    wanted = {root / BENCHMARKS: benchmarks(root, measured)}
    for path in sorted(path for pattern in MARKED for path in root.glob(pattern)):
        if path not in wanted:
            wanted[path] = fill_regions(path.read_text(encoding="utf-8"), measured)
    return wanted


def differing(root: Path) -> list[Path]:
    """Documents that do not say what the measurements say."""
    return [
        path
        for path, text in documents(root).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Runs the measurement that the module describes."""
    parser = argparse.ArgumentParser(description="Writes what was measured into the documents.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a document differs"
    )
    try:
        changed = differing(REPOSITORY)
        for path in changed:
            print(
                f"{'differs from its measurements' if parser.parse_args().check else 'written'}:"
                f" {path.relative_to(REPOSITORY)}"
            )
        if parser.parse_args().check:
            return 1 if changed else 0
        for path, text in documents(REPOSITORY).items():
            if path in changed:
                write_file(path, lambda file, text=text: file.write(text.encode()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
