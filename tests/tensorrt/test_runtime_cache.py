"""Compiled kernels are kept beside the engines and taken from there, where they are of these
engines and this GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from ssd_export.tensorrt.engine_files import find_engines
from ssd_export.tensorrt.runtime_cache import NAME, RuntimeCache, engines_digest
from tests.tensorrt.trt_bundles import CAPABILITY, Doubles, copied_bundle, doubles

pytestmark = pytest.mark.slow
PROMPT = ["a red circle"]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    return doubles(monkeypatch, copied_bundle(tmp_path))


def start(made: Doubles) -> list[str]:
    """Opens a runner, begins an image and closes it; returns what was compiled."""
    made.trt.compiled.clear()
    made.bundle = open_bundle(made.path)
    with made.generator() as generator:
        next(generator.stream(PROMPT, seed=1))
    assert made.cuda.alive == [] and made.cuda.faults == []
    return list(made.trt.compiled)


def cache_file(made: Doubles) -> Path:
    (path,) = made.path.rglob(NAME)
    return path


def test_the_second_start_compiles_nothing(made: Doubles) -> None:
    assert set(start(made)) >= {"prefill", "decode_step"}
    name = f"{cache_file(made).parent.relative_to(made.path)}/{NAME}"
    assert name in open_bundle(made.path).files, "the manifest lists it"
    assert start(made) == []


def test_a_start_that_compiles_nothing_leaves_the_file(made: Doubles) -> None:
    start(made)
    before = cache_file(made).stat()
    start(made)
    assert cache_file(made).stat() == before


@pytest.mark.parametrize("why", ["another GPU", "other engines", "cut off", "not in the manifest"])
def test_a_cache_that_will_not_do_is_compiled_anew_and_replaced(made: Doubles, why: str) -> None:
    first = start(made)
    bundle, path = open_bundle(made.path), cache_file(made)
    name, content = str(path.relative_to(made.path)), path.read_bytes()
    changed: dict[str, Callable[[], object]] = {
        "another GPU": lambda: setattr(made.trt, "environment", b"another GPU"),
        "other engines": lambda: bundle.add_files({name: b"\0" * 32 + content[32:]}),
        "cut off": lambda: bundle.add_files({name: content[:40]}),
        "not in the manifest": lambda: bundle.add_files({}, instead_of=[name]),
    }
    changed[why]()
    assert start(made) == first
    assert start(made) == []


def test_a_bundle_that_cannot_be_written_runs_all_the_same(
    made: Doubles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise UserError("the bundle is not writable")

    monkeypatch.setattr("ssd_export.bundle.Bundle.add_files", refuse)
    with caplog.at_level("INFO"):
        assert start(made)
    assert "compiled kernels are not kept (the bundle is not writable)" in caplog.text


def test_tensorrt_proper_has_no_such_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path), is_rtx=False)
    start(made)
    assert not list(made.path.rglob(NAME))


def test_the_digest_depends_on_every_engine(made: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_engines(made.bundle, CAPABILITY)
    graphs = dict(files.manifest.graphs)
    digests = {engines_digest(files)}
    for name in list(graphs):
        monkeypatch.setitem(files.manifest.graphs, name, graphs["evict"])
        digests.add(engines_digest(files))
    assert len(digests) == 1 + len(graphs) - 1 and RuntimeCache(files)._held == b""
