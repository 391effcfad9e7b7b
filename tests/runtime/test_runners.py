"""The registry of runners: every row is whole, and what a row does not have is refused at once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.runner import InspectableRunner
from ssd_export.runtime.runners import (
    DEFAULT,
    KINDS,
    NAMES,
    check_threads,
    find_runner,
    open_runner,
)
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

PACKAGE = Path(__file__).parents[2] / "ssd_export"


def refused(work: object, *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as error:
        work(*arguments, **options)  # type: ignore[operator]
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_row_is_a_file_with_all_that_a_runner_has(kind: object) -> None:
    module, _, name = kind.place.partition(":")
    runner = getattr(importlib.import_module(module), name)
    wanted = [name for name in dir(InspectableRunner) if not name.startswith("_")]
    assert [name for name in (*wanted, "from_bundle") if not hasattr(runner, name)] == []
    assert runner.__name__ in Path(importlib.import_module(module).__file__).read_text()
    assert find_runner(kind.name) is kind and kind.provider() == kind.providers[0]


def test_an_unknown_runner_is_told_which_there_are() -> None:
    message = refused(find_runner, "trrt")
    assert "'trrt'" in message
    for kind in KINDS:
        assert f"{kind.name} ({kind.title})" in message


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("provider", ["x", "", "CPU"])
def test_an_unknown_provider_is_told_which_there_are(kind: object, provider: str) -> None:
    message = refused(kind.provider, provider)
    assert repr(provider) in message and all(name in message for name in kind.providers)


def test_nothing_is_opened_before_runner_provider_and_threads_are_known(tmp_path: Path) -> None:
    for wrong in ({"runner": "x"}, {"provider": "x"}, {"runner": "trt", "provider": "cpu"}):
        message = refused(ImageGenerator.from_bundle, tmp_path / "missing", **wrong)
        assert repr([*wrong.values()][-1]) in message
    assert "num_threads 0" in refused(ImageGenerator.from_bundle, tmp_path, num_threads=0)


@pytest.mark.parametrize("value", [0, -1, 100_000, 1.5, "2", True])
def test_threads_that_cannot_help(value: object) -> None:
    assert "--threads" in refused(check_threads, value, "--threads")


def test_threads_that_can() -> None:
    assert check_threads(None) is None and check_threads(1) == 1 and check_threads(16) == 16


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.requires], ids=lambda k: k.name)
def test_a_missing_package_names_what_brings_it(
    kind: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == kind.requires[0] or name.endswith("_runner"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind.requires[0], None)
    message = refused(kind.load)
    assert kind.requires[0] in message and kind.install in message


def test_a_package_that_does_not_load_is_another_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("libcudnn.so.9: cannot open shared object file", name="onnxruntime.capi")

    monkeypatch.setattr("ssd_export.runtime.runners.importlib.import_module", broken)
    message = refused(find_runner("ort").load)
    assert "cannot load onnxruntime (libcudnn.so.9" in message and "another --runner" in message


def test_names_of_runners_are_compared_in_one_file() -> None:
    sources = list(PACKAGE.rglob("*.py"))
    assert len(sources) > 100
    for source in sources:
        if source.name != "runners.py":
            text = source.read_text(encoding="utf-8")
            for name in NAMES:
                for compared in (f'== "{name}"', f'!= "{name}"', f'"{name}" =='):
                    assert compared not in text, f"{source} compares with {name}"


def test_the_default_runner_opens() -> None:
    opened = open_bundle(bundle(checkpoint(TinyJanus()), "h2o", 0.2))
    runner = open_runner(opened, num_threads=1)
    assert f":{type(runner).__name__}" in find_runner(DEFAULT).place
    runner.close()
