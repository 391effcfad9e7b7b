"""The comparison with other runtimes: ratios round by round, and processes that take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import compare, shape
from benchmarks.peers.compare import (
    COLUMNS,
    Peer,
    Workplace,
    figures_of,
    measure,
    ratio_text,
    rows_of,
)
from ssd_export.policy.head_map import HeadMap

STUB = """
from benchmarks.peers.protocol import serve
serve(lambda: lambda: sum(range(20000)))
"""


def facts(*cpu_ms: float) -> dict[str, object]:
    """Figures of a peer of two threads that both compute half of the time."""
    wall_ms = [ms / 2 for ms in cpu_ms]
    return {"cpu_ms": list(cpu_ms), "wall_ms": wall_ms, "open_cpu_s": 1.0, "peak_mb": 1234.5}


def test_a_ratio_is_of_one_round() -> None:
    """A round that was slow for everybody moves no ratio."""
    assert ratio_text([20, 200, 22], [10, 100, 10]) == "2.00 (2.00 to 2.20)"


def test_figures_are_medians_of_ratios_of_cpu_time() -> None:
    found = {compare.REFERENCE: facts(10, 11, 12), "other, int4": facts(20, 33, 24)}
    figures = figures_of({"8 images, 2 threads": found})
    assert figures == {"this_project-int4-8-2": "1.0", "other-int4-8-2": "2.0"}


def test_the_fastest_comes_first() -> None:
    rows = rows_of({compare.REFERENCE: facts(10, 11, 12), "other": facts(5, 5.5, 6)}, 8, 2)
    assert [row[0] for row in rows] == ["other", compare.REFERENCE]
    assert dict(zip(COLUMNS, rows[0], strict=True)) == {
        "runtime": "other",
        "images": "8",
        "threads": "2",
        "CPU ms a step": "5.5",
        "times this project's int4 (range)": "0.50 (0.50 to 0.50)",
        "wall ms a step": "2.8",
        "times by wall clock (range)": "0.50 (0.50 to 0.50)",
        "opening, CPU s": "1.0",
        "peak MB": "1,234",
    }


def test_matrices_of_one_shape_differ() -> None:
    first, second = (shape.random_matrix(8, 16, number) for number in (0, 1))
    assert first.shape == (8, 16) and (first != second).any()
    assert (shape.random_matrix(8, 16, 1) == second).all()


class StubPlace(Workplace):
    """A workplace whose peers run a script instead of a runtime."""

    def start(self, peer: Peer, num_images: int, num_threads: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", peer.model.read_text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=compare._environment(num_threads),
        )


@pytest.mark.skipif(
    sys.platform != "linux", reason="peak memory is read from /proc, which is Linux'"
)
def test_processes_take_turns_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ROUNDS", 2)
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    peers = [Peer(compare.REFERENCE, "", script), Peer("other", "", script)]
    found = measure(StubPlace(tmp_path, 1), peers, 1, 1)
    assert len(found) == 2
    assert all(len(one["cpu_ms"]) == len(one["wall_ms"]) == 2 for one in found.values())
    assert all(one["peak_mb"] > 1 and min(one["cpu_ms"]) > 0 for one in found.values())
    json.dumps(found)


def test_a_peer_that_ends_is_named(tmp_path: Path) -> None:
    script = tmp_path / "stub.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="broken ended with exit code 3"):
        measure(StubPlace(tmp_path, 1), [Peer("broken", "", script)], 1, 1)


def test_llama_cpp_is_built_where_its_models_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(compare, "_run", lambda *command, **_: commands.append(command))
    place = Workplace(tmp_path, 6)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "q8_0.gguf").touch()
    peers = place.llama_cpp(["int4", "int8"])
    assert [peer.name for peer in peers] == ["llama.cpp, Q4_0", "llama.cpp, Q8_0"]
    assert [command[-4:] for command in commands] == [
        ("build", str(tmp_path / "gguf"), "6", "q4_0")
    ]


def test_our_bundle_is_exported_with_the_map_of_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has some layers of the shape whose built-in map has them all."""
    commands: list[tuple[str, ...]] = []

    def run(*command: str) -> None:
        commands.append(command)
        (tmp_path / "janus").mkdir(exist_ok=True)

    monkeypatch.setattr(compare, "_run", run)
    folder = Workplace(tmp_path, 3)._bundle("int4")
    assert HeadMap.load(tmp_path / "janus" / "head_map.json").num_layers == 3
    assert [command[1:3] for command in commands] == [
        ("-m", "benchmarks.synthetic_checkpoint"),
        ("cli.py", "export"),
    ]
    assert "--head-map" not in commands[1] and str(folder) in commands[1]


@pytest.mark.parametrize(
    "options",
    ["", " --images 8 --threads 1 --threads 2 --format int8 --num-layers 2 --llama-cpp"],
)
def test_the_command_measures_the_same(options: str) -> None:
    """What stands beside the figures, without the folder's place."""
    command = "python -m benchmarks.peers.compare --work FOLDER" + options
    asked = compare.arguments_parser().parse_args(command.split()[3:])
    assert compare.command_of(asked) == command
