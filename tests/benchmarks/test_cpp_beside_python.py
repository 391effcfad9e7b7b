"""Figures of the C++ library beside Python: which rows count, and that other tokens end the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cpp_beside_python as benchmark
from benchmarks.cpp_beside_python import COLUMNS, Run, case_row, of_rows


def test_the_first_and_the_last_row_do_not_count() -> None:
    assert of_rows([9.0, 10.0, 12.0, 13.0, 99.0], 4) == 0.25


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of the runs: C++ takes 2 s a token, Python 4 s, 8 s in the last round."""
    order: list[str] = []

    def cpp(program: Path, bundle: Path, options: dict[str, int]) -> Run:
        order.append("cpp")
        return Run(2.0, 3_000_000, [[options["seed"]]])

    def python(bundle: Path, options: dict[str, int]) -> Run:
        order.append("python")
        last = options["seed"] == 2
        return Run(8.0 if last else 4.0, 5_000_000, [[options["seed"]]])

    monkeypatch.setattr(benchmark, "run_cpp", cpp)
    monkeypatch.setattr(benchmark, "run_python", python)
    return order


def test_a_row_has_medians_and_peaks(runs: list[str]) -> None:
    row = case_row("one image", {}, Path("program"), Path("bundle"), rounds=3)
    assert row == ["one image", 3, 2000.0, 4000.0, "0.50", 3, 5]
    assert len(row) == len(COLUMNS)
    assert runs == ["cpp", "python", "python", "cpp", "cpp", "python"], "they take turns"


def test_other_tokens_end_the_run(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "run_cpp", lambda *asked: Run(2.0, 1, [[7]]))
    with pytest.raises(SystemExit, match="one image, seed 0: the tokens differ"):
        case_row("one image", {}, Path("program"), Path("bundle"), rounds=1)
