"""Versions are compared with the bounds that pyproject.toml declares."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from ssd_export.doctor import packages
from ssd_export.doctor.packages import Package

ROOT = Path(__file__).parents[2]


def test_the_bounds_are_those_of_pyproject() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    found = {one.name: one for one in packages.packages(("export", "ort"))}
    assert {"numpy", "onnx-ir", "onnxruntime", "torch"} <= found.keys()
    assert {"fastapi", "triton", "ssd-export"}.isdisjoint(found)  # of other extras
    for name in ("numpy", "onnx-ir", "torch"):
        bound = re.search(rf'"{name}>=([\d.]+)', declared)
        assert bound is not None and found[name].least == bound[1]
        assert found[name].version == metadata.version(name)
    assert (found["numpy"].extra, found["torch"].extra) == ("", "export")


@pytest.mark.parametrize(
    "installed, least, old",
    [
        ("1.20.0", "1.20", False),
        ("1.19.9", "1.20", True),
        ("1.9", "1.10", True),
        ("2.6.0+cpu", "2.6", False),
        ("2.6rc1", "2.6", False),
        ("", "1.0", False),
    ],
)
def test_what_is_too_old(installed: str, least: str, old: bool) -> None:
    assert Package("x", "", least, installed).is_old is old


def test_two_onnxruntimes_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "1.20")
    assert packages.clashing() == ["onnxruntime", "onnxruntime-gpu"]
    monkeypatch.setattr(packages, "version", lambda name: "1.20" if name == "onnxruntime" else "")
    assert packages.clashing() == []


def test_sources_that_were_never_installed_have_no_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "DISTRIBUTION", "ssd-export-of-another-world")
    assert packages.packages(("export",)) == []
