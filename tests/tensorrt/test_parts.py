"""The pieces around a build, without TensorRT: stub library, messages, progress, interruption,
memory, kernel choice.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from ssd_export.errors import UserError
from ssd_export.kernels.image import Variant
from ssd_export.tensorrt import plugin
from ssd_export.tensorrt.build_memory import check_memory
from ssd_export.tensorrt.build_progress import Phases
from ssd_export.tensorrt.builder_config import use_timing_cache
from ssd_export.tensorrt.interruptible import run_interruptible
from ssd_export.tensorrt.messages import judge, one_line
from ssd_export.tensorrt.plugin import LIBRARY, LIBRARY_VARIABLE, find_library, kernel_for
from ssd_export.tensorrt.stub_library import stub_library

LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: other systems have other library names"
)
USE_STUB = """
import ctypes, sys
from ssd_export.tensorrt.stub_library import load_stub
load_stub("libssd_export_no_such_name.so", sys.argv[1])
print(ctypes.CDLL("libssd_export_no_such_name.so").cos)
"""


@LINUX
def test_the_stub_lends_a_loaded_library_another_name() -> None:
    run = subprocess.run(
        [sys.executable, "-c", USE_STUB, "libm.so.6"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert "_FuncPtr" in run.stdout


@LINUX
def test_the_stub_asks_for_no_executable_stack() -> None:
    library = stub_library("libname.so", "libneeded.so.1", 62)
    assert library[:4] == b"\x7fELF" and len(library) < 512
    assert (0x6474E551).to_bytes(4, "little") + (6).to_bytes(4, "little") in library


def test_an_unused_input_fails_and_harmless_warnings_are_dropped() -> None:
    harmless = [
        (
            "ImporterContext.hpp:501: A node named node_Mul_1 already exists, the output tensors of"
            " this new instance will not be queryable."
        ),
        "ModelImporter.cpp:1071: Make sure input step has Int64 binding.",
    ]
    assert judge("decode_step", harmless) == []
    assert judge(
        "decode_step", [*harmless, "a.cpp:1: something\nnew", "a.cpp:1: something\nnew"]
    ) == ["something new"]
    for text in (
        "Unused Input: nonpad_kv_seqlen",
        "Falling back to FP32 for layer x",
        "parser.cpp:12: Detected layernorm nodes in FP16: norm",
        "Running layernorm after self-attention in FP16 may cause overflow.",
        "Weights [name=w] had the following issues when converted to FP16:\n - Subnormal values",
        "One or more weights outside the range of INT32 was clamped",
    ):
        with pytest.raises(UserError, match="decode_step would not be built as it was exported"):
            judge("decode_step", [*harmless, text])


def test_a_warning_is_chosen_by_its_message_not_by_a_word_in_it() -> None:
    for text in (
        "Profile 0 is tuned for sizes that cannot overflow",
        "Some tactics lack workspace; falling back to other tactics of the same precision",
        "Unused input buffers are freed after the build",
        "Using the fallback allocator of the host",
    ):
        assert judge("decode_step", [text]) == [text]


def test_a_message_is_one_short_line() -> None:
    assert one_line("ModelImporter.cpp:12: a\n  b") == "a b"
    assert one_line("[localCheckMacros.cpp::getErrorStr::132] Error Code 2: a") == "Error Code 2: a"
    assert len(one_line("x" * 1000)) < 310


def test_only_phases_that_take_a_while_are_told() -> None:
    now, told = [0.0], []
    phases = Phases("prefill", lambda *call: told.append(call), Event(), clock=lambda: now[0])
    phases.start("Building engine", None, 2)
    phases.start("Timing graph nodes", "Building engine", 3)
    assert phases.step("Timing graph nodes", 0) and told == []
    now[0] = 2.0
    phases.step("Timing graph nodes", 1)
    phases.finish("Timing graph nodes")
    phases.step("Building engine", 0)
    phases.finish("Building engine")
    assert told == [("prefill: timing graph nodes", 2, 3), ("prefill: timing graph nodes", 3, 3)]
    phases.cancelled.set()
    assert not phases.step("anything", 0)


def test_an_interrupt_sets_the_flag_and_waits_for_the_work() -> None:
    # a shell that runs the tests in the background makes them ignore the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    cancelled, ended, told = Event(), [], []

    def work() -> None:
        os.kill(os.getpid(), 2)
        cancelled.wait(20)
        ended.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_interruptible(work, cancelled, stopping=lambda: told.append(True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled.is_set() and ended and told


def test_results_and_errors_come_through() -> None:
    assert run_interruptible(lambda: 3, Event()) == 3
    with pytest.raises(ZeroDivisionError):
        run_interruptible(lambda: 1 // 0, Event())


def test_too_little_memory_is_refused_with_three_ways_out() -> None:
    check_memory(1 << 30, 2 << 30, "float16", "none")
    check_memory(1 << 30, None, "float16", "none")
    with pytest.raises(UserError) as refused:
        check_memory(8 << 30, 5 << 30, "float32", "none")
    for part in (
        "8.0 GiB",
        "5.0 GiB are free",
        "--dtype fp16",
        "3.0 GiB of swap",
        "larger machine",
        "--force-memory",
    ):
        assert part in str(refused.value)
    with pytest.raises(UserError, match="--weights int4"):
        check_memory(8 << 30, 5 << 30, "float16", "none")
    with pytest.raises(UserError) as refused:
        check_memory(8 << 30, 5 << 30, "float16", "int4")
    assert "--weights" not in str(refused.value), "they are int4 already"


GIVE_BACK = """
import ctypes, sys
from ssd_export.tensorrt.allocator import return_large_buffers
from ssd_export.machine import resident_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "on":
    assert return_large_buffers()
SIZE = 20 << 20
def buffer():
    address = libc.malloc(SIZE)
    ctypes.memset(address, 1, SIZE)
    return address
libc.free(buffer())  # glibc now takes buffers of this size from its heap, unless told otherwise
large = buffer()
above = libc.malloc(100_000)  # the heap cannot shrink below this one
before = resident_bytes()
libc.free(large)
print(before - resident_bytes())
"""


@LINUX
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_freed_buffers_are_given_back() -> None:
    def freed(mode: str) -> int:
        command = [sys.executable, "-c", GIVE_BACK, mode]
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
        )
        return int(run.stdout)

    assert freed("on") > 19 << 20 > 1 << 20 > freed("off")


class TimingCaches:
    """A builder config's side of a timing cache: what it holds, and what a build measured. foreign:
    what it does not take; damaged: what it makes no cache of.
    """

    def __init__(self, foreign: tuple[bytes, ...] = (), damaged: tuple[bytes, ...] = ()) -> None:
        self.given, self.foreign, self.damaged = b"", foreign, damaged

    def create_timing_cache(self, data: bytes) -> TimingCaches | None:
        self.given = data
        return None if data in self.damaged else self

    def set_timing_cache(self, cache: TimingCaches, ignore_mismatch: bool) -> bool:
        assert cache is self and not ignore_mismatch
        return self.given not in self.foreign

    def get_timing_cache(self) -> TimingCaches:
        return self

    def serialize(self) -> bytes:
        return self.given + b" and more"


@pytest.mark.parametrize("foreign", [b"of another GPU", b"damaged"])
def test_a_timing_cache_that_tensorrt_does_not_take_is_measured_anew(
    foreign: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "timing.cache"
    kept.write_bytes(foreign)
    caches = TimingCaches(foreign=(b"of another GPU",), damaged=(b"damaged",))
    use_timing_cache(timing_plan(kept), caches, tmp_path)()
    assert kept.read_bytes() == b" and more" and "measured anew" in caplog.text


def timing_plan(timing_cache: Path | None, bundled: Path | None = None) -> Any:
    """As much of a BuildPlan for TensorRT as a timing cache asks for."""
    files = {"engines/x/timing.cache": {}} if bundled else {}
    bundle = SimpleNamespace(files=files, file=lambda name: bundled)
    flavor = SimpleNamespace(builds_anywhere=False)
    return SimpleNamespace(
        builder_flavor=flavor, folder="engines/x", timing_cache=timing_cache, bundle=bundle
    )


def test_the_timing_cache_goes_from_build_to_build(tmp_path: Path) -> None:
    keep = use_timing_cache(timing_plan(None), first := TimingCaches(), tmp_path)
    keep()
    assert first.given == b"" and (tmp_path / "timing.cache").read_bytes() == b" and more"
    use_timing_cache(timing_plan(None), second := TimingCaches(), tmp_path)()
    assert second.given == b" and more", "the graphs of one build share it"
    bundled = tmp_path / "bundled"
    bundled.write_bytes(b"earlier")
    (tmp_path / "new").mkdir()
    use_timing_cache(timing_plan(None, bundled), later := TimingCaches(), tmp_path / "new")()
    assert later.given == b"earlier", "and so do builds of one bundle"
    use_timing_cache(
        timing_plan(tmp_path / "own", bundled), own := TimingCaches(), tmp_path / "new"
    )()
    assert own.given == b"" and (tmp_path / "own").exists()
    with pytest.raises(UserError, match="choose another --timing-cache"):
        use_timing_cache(timing_plan(tmp_path / "no" / "folder"), TimingCaches(), tmp_path)()


def test_a_library_is_not_taken_from_the_folder_where_somebody_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "build" / "plugins").mkdir(parents=True)
    (tmp_path / "build" / "plugins" / LIBRARY).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(plugin, "SOURCE_TREE", tmp_path / "the source tree")
    with pytest.raises(UserError, match="no plugin library at .*the source tree.*build it: cmake"):
        find_library()
    monkeypatch.setattr(plugin, "SOURCE_TREE", tmp_path)
    assert find_library() == tmp_path / "build" / "plugins" / LIBRARY
    monkeypatch.setenv("SSD_EXPORT_KERNELS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no kernel images in .*nowhere"):
        kernel_for((80,), Variant("float16", 32))


def test_the_kernel_is_a_cubin_for_one_gpu_and_ptx_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tensorrt.kernels import write_kernels

    monkeypatch.setenv(
        "SSD_EXPORT_KERNELS", str(write_kernels(tmp_path, targets=(75, 80, 120), head_dim=32))
    )
    variant = Variant("float16", 32)
    assert kernel_for((120,), variant)[1]["layer"].startswith(b"cubin of 120")
    assert all(b".target sm_80" in code for code in kernel_for((86,), variant)[1].values())
    image, data = kernel_for((86, 89, 120), variant)
    assert image.target == 80 and b".target sm_80" in data["layer"]
    assert kernel_for((120, 121), variant)[0].target == 80
    with pytest.raises(UserError, match="no kernel image"):
        kernel_for((86, 89), Variant("float16", 64))
