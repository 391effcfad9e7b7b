"""Compares decode steps of this project's bundles with other runtimes' and writes
docs/measurements/peers.json.

    python -m benchmarks.peers.compare --work FOLDER [--images 1 --images 8] [--threads 1]
        [--llama-cpp]

Every peer computes the same shape (shape.py) on two rows an image; this project's steps have
guidance, aligner, sampler and a compressed cache besides. All processes are open at once and take
turns, a few steps each, so that other work on the machine falls on each of them: a ratio is of two
medians of one round, and its range is over the rounds. Peers are installed into an environment of
their own under FOLDER; what is there already is used again. llama.cpp is built from source, which
takes minutes: only where --llama-cpp asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_export.policy.head_map import BUILT_IN_DIRECTORY, HeadMap
from ssd_export.report.environment import busy_note
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.ort_operators import find_operators

JSON = Path("docs/measurements/peers.json")
PACKAGES = ("onnxruntime-genai", "openvino", "nncf")
LLAMA_CPP = ("llama-cpp-python", "gguf")
# Of llama-cpp-python 0.3.36 ggml_backend_amx_mul_mat ends with a segmentation
# fault on a Xeon with AMX. AVX-512 and VNNI stay.
LLAMA_CPP_FLAGS = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
GGUF = {"int4": "q4_0", "int8": "q8_0"}
REPOSITORY = Path(__file__).parents[2]
ROUNDS, STEPS = 7, 6
NUM_LAYERS = 6
REFERENCE = "this project, int4"
COLUMNS = [
    "runtime",
    "images",
    "threads",
    "CPU ms a step",
    "times this project's int4 (range)",
    "wall ms a step",
    "times by wall clock (range)",
    "opening, CPU s",
    "peak MB",
]


@dataclass(frozen=True)
class Peer:
    """A runtime with a model. module: of benchmarks.peers; own: whether it runs in the peers'
    environment.
    """

    name: str
    module: str
    model: Path
    own: bool = True


class Workplace:
    """The folder with the peers' environment and everybody's models."""

    def __init__(self, folder: Path, num_layers: int) -> None:
        self.folder, self._num_layers = folder.absolute(), num_layers

    @property
    def python(self) -> Path:
        """The interpreter of the peers' environment."""
        return self.folder / "env" / "bin" / "python"

    def install(self) -> None:
        """Makes the environment; torch and transformers are those of this one."""
        if self.python.exists():
            return
        _run(sys.executable, "-m", "venv", str(self.python.parents[1]))
        _run(str(self.python), "-m", "pip", "install", *PACKAGES)
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        theirs = subprocess.check_output([str(self.python), "-c", script], text=True).strip()
        (Path(theirs) / "of_ssd_export.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install_llama_cpp(self) -> None:
        """Builds llama.cpp for this processor, with the compiler that is here."""
        if (self.folder / "gguf").exists():
            return
        flags = LLAMA_CPP_FLAGS if platform.machine() == "x86_64" else ""
        options = [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
        settings = {"CMAKE_ARGS": shlex.join(options)}
        _run(str(self.python), "-m", "pip", "install", "--no-cache-dir", *LLAMA_CPP, **settings)

    def llama_cpp(self, formats: Sequence[str]) -> list[Peer]:
        """llama.cpp in its formats, the models built where they are missing."""
        python, made = str(self.python), []
        for name in (GGUF[format] for format in formats):
            path = self.folder / "gguf" / f"{name}.gguf"
            if not path.exists():
                self._module(python, "llama_cpp_peer", "build", path.parent, self._num_layers, name)
            made.append(Peer(f"llama.cpp, {name.upper()}", "llama_cpp_peer", path))
        return made

    def peers(self, formats: Sequence[str]) -> list[Peer]:
        """The other peers, their models built where they are missing. formats: int4, int8."""
        checkpoint = self.folder / "llama"
        if not checkpoint.exists():
            self._module(sys.executable, "llama_checkpoint", checkpoint, self._num_layers)
        made = []
        for format in formats:
            made.append(Peer(f"this project, {format}", "ours", self._bundle(format), own=False))
            made.append(Peer(f"OpenVINO, {format}", "openvino_peer", self._openvino(format)))
        made.append(Peer("onnxruntime-genai, int4", "genai_peer", self._genai(checkpoint)))
        made.append(Peer("transformers, fp32", "transformers_peer", checkpoint, own=False))
        return made

    def start(self, peer: Peer, num_images: int, num_threads: int) -> subprocess.Popen[str]:
        """The peer's process; it answers once it is open."""
        python = str(self.python) if peer.own else sys.executable
        module = f"benchmarks.peers.{peer.module}"
        return subprocess.Popen(
            [python, "-m", module, str(peer.model), str(num_images), str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(num_threads),
        )

    def _bundle(self, format: str) -> Path:
        folder, source = self.folder / f"ours-{format}", self.folder / "janus"
        if not source.exists() and not folder.exists():
            shape = ("--shape", "janus-pro-1b", "--dtype", "fp16")
            layers = ("--num-layers", str(self._num_layers))
            module = "benchmarks.synthetic_checkpoint"
            _run(sys.executable, "-m", module, *shape, *layers, str(source))
            built_in = HeadMap.load(BUILT_IN_DIRECTORY / "janus-pro-1b.json")
            built_in.first_layers(self._num_layers).save(source / "head_map.json")
        if not folder.exists():
            settings = ("--dtype", "fp32", "--weights", format)
            place = ("--model", str(source), "--out", str(folder))
            _run(sys.executable, "cli.py", "export", *place, *settings)
        return folder

    def _openvino(self, format: str) -> Path:
        path = self.folder / "openvino" / f"{format}.xml"
        if not path.exists():
            self._module(
                str(self.python), "openvino_peer", "build", path.parent, self._num_layers, format
            )
        return path

    def _genai(self, checkpoint: Path) -> Path:
        path = self.folder / "genai" / "model.onnx"
        if not path.exists():
            builder = "onnxruntime_genai.models.builder"
            asked = ("-i", str(checkpoint), "-o", str(path.parent), "-p", "int4", "-e", "cpu")
            options = ("--extra_options", "exclude_embeds=true", "int4_accuracy_level=4")
            cache = ("-c", str(self.folder / "genai-cache"))
            _run(str(self.python), "-m", builder, *asked, *cache, *options)
        return path

    def _module(self, python: str, module: str, *arguments: object) -> None:
        _run(python, "-m", f"benchmarks.peers.{module}", *map(str, arguments))


def _run(*command: str, **settings: str) -> None:
    """Raises SystemExit where the command fails. settings: environment variables."""
    done = subprocess.run(command, cwd=REPOSITORY, env=_environment(1) | settings)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}")


def _environment(num_threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(REPOSITORY)}


def measure(
    place: Workplace, peers: Sequence[Peer], num_images: int, num_threads: int
) -> dict[str, dict[str, Any]]:
    """Figures by peer: opening CPU seconds, peak MB, and the median CPU and wall ms of every
    round.
    """
    with ExitStack() as stack:
        running = {
            peer.name: stack.enter_context(place.start(peer, num_images, num_threads))
            for peer in peers
        }
        found: dict[str, dict[str, Any]] = {
            name: {**_answer(name, process), "cpu_ms": [], "wall_ms": []}
            for name, process in running.items()
        }
        for _ in range(ROUNDS):
            for name, process in running.items():
                assert process.stdin is not None
                print(STEPS, file=process.stdin, flush=True)
                answer = _answer(name, process)
                found[name]["peak_mb"] = answer["peak_mb"]
                for clock in ("cpu_ms", "wall_ms"):
                    found[name][clock].append(statistics.median(answer[clock]))
        for process in running.values():
            assert process.stdin is not None
            process.stdin.close()
    return found


def _answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended with exit code {process.wait()}")
    return json.loads(line)


def rows_of(found: dict[str, dict[str, Any]], num_images: int, num_threads: int) -> list[list[str]]:
    """A row for each peer, the fastest by the wall clock first."""
    reference = found[REFERENCE]
    ordered = sorted(found.items(), key=lambda item: statistics.median(item[1]["wall_ms"]))
    return [
        [
            name,
            str(num_images),
            str(num_threads),
            *(
                cell
                for clock in ("cpu_ms", "wall_ms")
                for cell in (
                    f"{statistics.median(facts[clock]):.1f}",
                    ratio_text(facts[clock], reference[clock]),
                )
            ),
            f"{facts['open_cpu_s']:.1f}",
            f"{facts['peak_mb']:,.0f}",
        ]
        for name, facts in ordered
    ]


def figures_of(runs: Mapping[str, dict[str, dict[str, Any]]]) -> dict[str, str]:
    """How many times this project's CPU time the others take, by peer, images and threads: keys as
    OpenVINO-int4-1-2.
    """
    figures = {}
    for cell, found in runs.items():
        images, _, threads, _ = cell.split()
        for name, facts in found.items():
            ratios = _ratios(facts["cpu_ms"], found[REFERENCE]["cpu_ms"])
            key = f"{name.replace(', ', '-').replace(' ', '_')}-{images}-{threads}"
            figures[key] = f"{statistics.median(ratios):.1f}"
    return figures


def _ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [value / base for value, base in zip(values, reference, strict=True)]


def ratio_text(values: Sequence[float], reference: Sequence[float]) -> str:
    """Median and range over the rounds of values over the reference's of the same round."""
    ratios = _ratios(values, reference)
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def command_of(asked: argparse.Namespace) -> str:
    """The command line that measures the same, the folder left open."""
    command = "python -m benchmarks.peers.compare --work FOLDER"
    for option in ("images", "threads", "format"):
        for value in getattr(asked, option) or ():
            command += f" --{option} {value}"
    if asked.num_layers != NUM_LAYERS:
        command += f" --num-layers {asked.num_layers}"
    return command + " --llama-cpp" * asked.llama_cpp


def arguments_parser() -> argparse.ArgumentParser:
    """The options of the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, action="append")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--num-layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--format", action="append", choices=("int4", "int8"))
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--json", type=Path, default=JSON)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison that the module describes."""
    asked = arguments_parser().parse_args(arguments)
    note = busy_note()
    place = Workplace(asked.work, asked.num_layers)
    place.install()
    formats = asked.format or ("int4", "int8")
    peers = place.peers(formats)
    if asked.llama_cpp:
        place.install_llama_cpp()
        peers += place.llama_cpp(formats)
    runs, rows = {}, []
    for num_images in asked.images or [1, 8]:
        for num_threads in asked.threads or [1]:
            found = measure(place, peers, num_images, num_threads)
            runs[f"{num_images} images, {num_threads} threads"] = found
            rows += rows_of(found, num_images, num_threads)
            for row in rows[-len(found) :]:
                print(" | ".join(row), flush=True)
    title = f"Decode steps at Janus-Pro-1B's shape, {asked.num_layers} layers and the head"
    text = (
        f"{ROUNDS} rounds in turns of {STEPS} steps, all runtimes in one run. This project's steps"
        " have a cache at budget 0.2, guidance, aligner and sampler; the others' a full cache of"
        " 320 tokens and nothing after the logits."
    )
    has_operators = find_operators() is not None
    text += f" This project's run with{'' if has_operators else 'out'} the library of operators."
    if not asked.llama_cpp:
        text += " llama.cpp, which is built from source, was not asked for."
    tables = [table(title, COLUMNS, rows, text)]
    results = {"tables": tables, "figures": figures_of(runs), "runs": runs}
    command = command_of(asked)
    write_measurement(asked.json, measurement(command, results, note))


if __name__ == "__main__":
    main()
