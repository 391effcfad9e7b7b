"""The backends tensorrt and tensorrt-rtx over doubles of TensorRT and of the CUDA driver, which
execute: the tokens and pixels of Python, every call in order, every refusal in Python's words.
Nothing here runs on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.errors import UserError
from ssd_export.tensorrt import engine_files
from ssd_export.tensorrt.engine_files import find_engines
from ssd_export.tensorrt.engine_manifest import engine_folders
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.runtime_cache import NAME as RUNTIME_CACHE
from ssd_export.tensorrt.runtime_cache import engines_digest
from tests.engines.builds import ENGINES, ROOT, Builds, one_line, run
from tests.engines.cases import DEMO_PROMPTS, Case, generated_by_python
from tests.engines.test_generate import check_events
from tests.engines.test_misuse import FEW_MODELS, run_misuse
from tests.engines.test_sanitizers import SUPPRESSED, THREADS
from tests.engines.trt_builds import TrtBuild, add_engines, include_folders, rtx_headers, trt_build
from tests.scene_bundles import rewrite_manifest
from tests.tensorrt.trt_double import CAPABILITY

pytestmark = pytest.mark.slow

Bundles = Callable[[str], Path]
BAD_BUNDLE, UNAVAILABLE, OUT_OF_MEMORY, INVALID, INTERNAL = 3, 4, 5, 2, 9
NUM_STEPS = 575  # of an image, after the prefill's token
LIBRARY = "libssd_export_plugin.so"
IN_OTHER_WORDS = {"--runner ort": "the backend onnxruntime"}


@dataclass(frozen=True)
class Engines:
    """bundle: a name of the fixture `bundles`; options: of write_engines."""

    bundle: str
    flavor: str
    options: dict[str, Any] = field(default_factory=dict)


FORMS = {
    "kv-update": Engines("ssd-auto", "tensorrt-rtx", {"top_k": True}),
    "as bundled": Engines("kv-int8", "tensorrt"),
    "plugin in the engine": Engines("ssd-auto", "tensorrt-rtx", {"plugin": True}),
    "plugin library": Engines("linear", "tensorrt", {"plugin": True, "in_engine": False}),
    "no evictions": Engines("full", "tensorrt", {"decoder_images": 1}),
}
TWO = tuple(DEMO_PROMPTS)
CASES = {
    "two batches, previews": (
        "kv-update",
        Case("ssd-auto", TWO, {"num_images": 2, "max_batch": 3, "seed": 3, "preview": True}),
    ),
    "two images decoded at once": (
        "kv-update",
        Case("ssd-auto", TWO, {"decoder_batch": 2, "negative_prompt": "blue", "cfg_scale": 3.0}),
    ),
    "top-k": ("kv-update", Case("ssd-auto", TWO[:1], {"top_k": 5, "seed": 2})),
    "greedy": ("kv-update", Case("ssd-auto", TWO[1:], {"temperature": 0.0})),
    "int8 cache": ("as bundled", Case("kv-int8", TWO, {"seed": 2**64 - 1})),
    "plugin": ("plugin in the engine", Case("ssd-auto", TWO[:1], {"seed": 4})),
    "decaying scores, plugin library": ("plugin library", Case("linear", TWO[:1], {"seed": 8})),
    "everything kept": ("no evictions", Case("full", TWO[:1], {"seed": 5})),
}


@pytest.fixture(scope="module")
def with_engines(
    trt: TrtBuild, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The bundle of a name of FORMS, engines inside; not to be changed."""
    made: dict[str, Path] = {}

    def path(form: str) -> Path:
        if form not in made:
            engines = FORMS[form]
            folder = tmp_path_factory.mktemp("engines") / "bundle"
            shutil.copytree(bundles(engines.bundle), folder)
            bundle = add_engines(folder, trt, engines.flavor, **engines.options)
            if not engines.options.get("in_engine", True):
                bundle.add_files({f"{engine_folders(bundle)[0]}/{LIBRARY}": b"library"})
            made[form] = folder
        return made[form]

    return path


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_pixels_are_pythons(
    name: str, trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    form, case = CASES[name]
    asked = {
        "prompts": case.prompts,
        "backend": FORMS[form].flavor,
        **case.to_json(with_engines(form)),
    }
    (generated,) = trt.run(with_engines(form), [asked], tmp_path)
    assert "error" not in generated.facts, generated.facts
    expected = generated_by_python(case, with_engines(form))
    assert len(np.unique(expected.tokens)) > 10, "a case whose tokens could not differ"
    np.testing.assert_array_equal(generated.tokens, expected.tokens)
    np.testing.assert_array_equal(generated.pixels, expected.pixels)
    assert generated.facts["cache_bytes"] == expected.facts["cache"].bytes
    assert generated.facts["planned_cache_bytes"] == expected.facts["cache"].bytes
    assert generated.facts["step_is_captured"] == 1
    check_events(case, generated, expected)


def calls_of(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_a_step_is_captured_once_and_launched_for_every_token(
    trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    case = {"prompts": ["a red circle"], "backend": "tensorrt-rtx"}
    trt.run(with_engines("kv-update"), [case, case], tmp_path)
    calls = calls_of(tmp_path)
    assert calls.count("cuStreamBeginCapture") == 2, "with an eviction before it and without"
    assert calls.count("cuGraphLaunch") == 2 * NUM_STEPS
    assert calls.count("run decode_step") == 2 * NUM_STEPS + 1, "and the run before a capture"
    launches = [place for place, call in enumerate(calls) if call == "cuGraphLaunch"]
    inside = calls[launches[0] : launches[NUM_STEPS - 1]]
    assert "cuMemAlloc" not in inside
    # The host comes back once a grid row: for its tokens and the logits that it checks.
    assert inside.count("cuMemcpyDtoHAsync") == 2 * 23
    assert 100 < calls.count("run evict") - 1 < 2 * NUM_STEPS, "only where a head may be full"
    made = [call for call in calls if call.startswith("setOptimizationProfileAsync")]
    assert sorted(made) == sorted({*made}), "the second generation uses the first one's contexts"
    assert calls.count("cuLaunchKernel") == 2 * 24, "noise, a grid row at a time"


def test_what_runs_is_destroyed_before_what_it_runs_on(
    trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    trt.run(
        with_engines("kv-update"),
        [{"prompts": ["a red circle"], "backend": "tensorrt-rtx"}],
        tmp_path,
    )
    calls = calls_of(tmp_path)
    last = {call: place for place, call in enumerate(calls)}
    order = [
        "cuGraphExecDestroy",
        "cuModuleUnload",
        "- context of decode_step",
        "cuStreamDestroy",
        "- engine of decode_step",
        "- runtime cache",
        "- runtime",
        "cuMemFree",
        "cuDevicePrimaryCtxRelease",
    ]
    assert [last[call] for call in order] == sorted(last[call] for call in order)
    assert last["cuDevicePrimaryCtxRelease"] == len(calls) - 1


def test_kernels_that_the_bundle_keeps_are_not_compiled_again(
    trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(with_engines("kv-update"), tmp_path / "bundle")
    case = {"prompts": ["a red circle"], "backend": "tensorrt-rtx", "first_row": True}
    trt.run(tmp_path / "bundle", [case], tmp_path)
    assert "compiled decode_step" in calls_of(tmp_path)
    bundle = open_bundle(tmp_path / "bundle")
    files = python_engines(bundle, trt, "tensorrt-rtx")
    kernels = b"one GPU, one driver:prefill,decode_step,evict,image_decoder"
    name = f"{files.folder}/{RUNTIME_CACHE}"
    bundle.add_files({name: engines_digest(files) + kernels})
    trt.run(bundle.path, [case], tmp_path)
    assert not [call for call in calls_of(tmp_path) if call.startswith("compiled")]
    bundle.add_files({name: bytes(32) + kernels})  # of other engines
    trt.run(bundle.path, [case], tmp_path)
    assert "compiled decode_step" in calls_of(tmp_path)


def python_engines(
    bundle: Bundle,
    trt: TrtBuild,
    flavor: str,
    capability: int = CAPABILITY,
    version: str = "",
) -> engine_files.EngineFiles:
    """find_engines of a machine with that TensorRT."""
    here = Flavor(flavor, version or trt.version_of(flavor), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_files, "is_installed", lambda name: True)
        patch.setattr(engine_files, "load_flavor", lambda name: here)
        return find_engines(bundle, capability)


def edit_engine_json(pattern: str, replacement: str) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        (file,) = bundle.glob("engines/*/engine.json")
        text, count = re.subn(pattern, replacement, file.read_text(), count=1)
        assert count == 1
        record(bundle, file, text.encode())

    return edit


def record(bundle: Path, file: Path, content: bytes) -> None:
    open_bundle(bundle).add_files({file.relative_to(bundle).as_posix(): content})


def change(pattern: str, content: bytes) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        (file,) = bundle.glob(pattern)
        file.write_bytes(content)

    return edit


def change_and_record(pattern: str, content: bytes) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        (file,) = bundle.glob(pattern)
        record(bundle, file, content)

    return edit


def drop_engines(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines")
    rewrite_manifest(bundle)


REFUSED_BY_PYTHON: dict[str, tuple[Callable[[Path], None], dict[str, str]]] = {
    "no engines": (drop_engines, {}),
    "another GPU": (lambda bundle: None, {"SSD_FAKE_CAPABILITY": "87"}),
    "another version": (lambda bundle: None, {"SSD_FAKE_VERSION": "1.8.0.2"}),
    "another system": (edit_engine_json('"os": "linux"', '"os": "windows"'), {}),
    "another bundle": (edit_engine_json('"bundle_hash": "...', '"bundle_hash": "000'), {}),
    "an older schema": (edit_engine_json('"schema": 3', '"schema": 2'), {}),
    "no JSON value": (edit_engine_json('"prompt_slots": [0-9]+', '"prompt_slots": "many"'), {}),
    "a slot too many": (edit_engine_json('"prompt_slots": [0-9]+', '"prompt_slots": 0'), {}),
    "a form of its own": (edit_engine_json('"form": "kv-update"', '"form": "cubist"'), {}),
    "a falling profile": (edit_engine_json(r'"images": \[\s*1', '"images": [9'), {}),
    "no flavor": (edit_engine_json('"flavor": "tensorrt-rtx",', ""), {}),
    "changed engine.json": (change("engines/*/engine.json", b"{}"), {}),
}


@pytest.mark.parametrize("name", REFUSED_BY_PYTHON)
def test_refusals_are_pythons(
    name: str, trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    damage, environment = REFUSED_BY_PYTHON[name]
    bundle = tmp_path / "bundle"
    shutil.copytree(with_engines("kv-update"), bundle)
    damage(bundle)
    with pytest.raises(UserError) as refused:
        python_engines(
            open_bundle(bundle),
            trt,
            "tensorrt-rtx",
            int(environment.get("SSD_FAKE_CAPABILITY", CAPABILITY)),
            environment.get("SSD_FAKE_VERSION", ""),
        )
    wanted = str(refused.value)
    for theirs, ours in IN_OTHER_WORDS.items():
        wanted = wanted.replace(theirs, ours)
    case = {"prompts": ["a red circle"], "backend": "tensorrt-rtx", "first_row": True}
    (made,) = trt.run(bundle, [case], tmp_path, **environment)
    assert made.facts["error"] == wanted
    assert made.facts["status"] in (BAD_BUNDLE, UNAVAILABLE)


@dataclass(frozen=True)
class Refusal:
    """What is asked of which engines, on what machine, and the answer: a status and a pattern."""

    status: int
    sentence: str
    form: str = "kv-update"
    damage: Callable[[Path], None] = lambda bundle: None
    case: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def refusing(call: str, status: int, sentence: str, **more: Any) -> Refusal:
    """A call that fails; SAID in the sentence: what the double says of it."""
    said = f"Error Code 6: {call.partition(':')[0]} was refused"
    return Refusal(
        status, sentence.replace("SAID", said), environment={"SSD_FAKE_REFUSE": call}, **more
    )


REFUSALS = {
    "no GPU": Refusal(
        UNAVAILABLE,
        "this machine has no NVIDIA GPU, or no driver for it; use the backend onnxruntime .*",
        environment={"SSD_FAKE_GPUS": "0"},
    ),
    "a GPU that is not there": Refusal(
        INVALID, "device 3 is not one of the 1 GPUs of this machine; .*", case={"device": 3}
    ),
    "a provider of another backend": Refusal(
        INVALID, "unknown provider 'cpu'; TensorRT runs on cuda alone", case={"provider": "cpu"}
    ),
    "a library older than the headers": Refusal(
        UNAVAILABLE,
        r"tensorrt-rtx 1\.2\.0\.9 was loaded and this ssd_runtime was built for 1\.7 or .*",
        environment={"SSD_FAKE_VERSION": "1.2.0.9"},
    ),
    "a library of another major version": Refusal(
        UNAVAILABLE,
        r"tensorrt-rtx 2\.0\.0\.9 was loaded and this ssd_runtime was built for 1\.7 or .*",
        environment={"SSD_FAKE_VERSION": "2.0.0.9"},
    ),
    "a changed engine": Refusal(
        BAD_BUNDLE,
        r"bundle .*: engines/.*/prefill\.engine was changed .*; build the engines again: .*",
        damage=change("engines/*/prefill.engine", b"the engine of PREFILL"),
    ),
    "another engine": Refusal(
        BAD_BUNDLE,
        "engines/.*/prefill.engine is not the engine that engine.json describes; build it here: .*",
        damage=change_and_record("engines/*/prefill.engine", b"the engine of evict"),
    ),
    "no engine of that kind": Refusal(
        UNAVAILABLE,
        ".* has no engine of prefill_top_k; build it here: .* --top-k, or use the backend .*",
        form="as bundled",
        case={"top_k": 5, "backend": "tensorrt"},
    ),
    "no plugin library": Refusal(
        BAD_BUNDLE,
        f"the engines need the plugin library engines/.*/{LIBRARY}, which is not there .*",
        form="plugin library",
        damage=change_and_record(f"engines/*/{LIBRARY}", b"another library"),
        case={"backend": "tensorrt"},
    ),
    "a plugin library that does not load": refusing(
        "loadLibrary",
        UNAVAILABLE,
        f".*{LIBRARY} does not load into tensorrt .* \\(SAID\\); build it .*",
        form="plugin library",
        case={"backend": "tensorrt"},
    ),
    "too little memory for the model": Refusal(
        OUT_OF_MEMORY,
        "the model needs .* of device memory and .* are free: generate fewer images .*",
        environment={"SSD_FAKE_BYTES": "100000"},
    ),
    "too little memory for the batch": Refusal(
        OUT_OF_MEMORY,
        "a batch of 1 needs .* of device memory and .* are free: generate fewer images .*",
        environment={"SSD_FAKE_BYTES": "9000000"},
    ),
    "no runtime": refusing(
        "createInferRuntime",
        UNAVAILABLE,
        r"tensorrt-rtx .* cannot start here \(SAID\); .*",
    ),
    "an engine that TensorRT refuses": refusing(
        "deserializeCudaEngine",
        UNAVAILABLE,
        r"TensorRT cannot load .*/prefill\.engine \(SAID\); build .*",
    ),
    "no context": refusing(
        "createExecutionContext",
        OUT_OF_MEMORY,
        r"TensorRT cannot run prefill here \(SAID\); free .*",
    ),
    "no profile": refusing(
        "setOptimizationProfileAsync",
        INTERNAL,
        "TensorRT refused profile 0 of prefill: SAID",
    ),
    "no shape": refusing(
        "setInputShape",
        INTERNAL,
        r"TensorRT refused shape \(.*\) of .*: SAID",
    ),
    "no address": refusing(
        "setTensorAddress:40",
        INTERNAL,
        "TensorRT refused the buffer of .*: SAID",
    ),
    "no run": refusing(
        "enqueueV3",
        INTERNAL,
        "TensorRT refused a run of evict: SAID",
    ),
    "no run later": refusing(
        "enqueueV3:3",
        INTERNAL,
        "TensorRT refused a run of prefill: SAID",
    ),
    **{
        f"{call} fails": refusing(
            call, INTERNAL, f"{call.partition(':')[0]}: a reason of the driver; nvidia-smi .*"
        )
        for call in (
            "cuDevicePrimaryCtxRetain",
            "cuMemAlloc",
            "cuMemAlloc:2",
            "cuMemAlloc:3",
            "cuStreamCreate",
            "cuStreamCreate:2",
            "cuModuleLoadData",
            "cuModuleGetFunction",
            "cuMemcpyHtoDAsync",
            "cuMemcpyDtoHAsync",
            "cuMemcpy2DAsync",
            "cuMemsetD8Async",
            "cuLaunchKernel",
            "cuGraphLaunch",
            "cuGraphLaunch:5",
        )
    },
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_a_status_and_a_sentence(
    name: str, trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    refusal = REFUSALS[name]
    bundle = tmp_path / "bundle"
    shutil.copytree(with_engines(refusal.form), bundle)
    refusal.damage(bundle)
    case = {"prompts": ["a red circle"], "backend": "tensorrt-rtx", "first_row": True}
    # The doubles end the process if anything outlives what it was made on.
    (made,) = trt.run(bundle, [case | refusal.case], tmp_path, **refusal.environment)
    assert re.fullmatch(refusal.sentence, made.facts["error"]), made.facts
    assert made.facts["status"] == refusal.status


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuGraphInstantiateWithFlags"])
def test_a_step_that_cannot_be_captured_is_queued_and_said(
    call: str, trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    case = {"prompts": ["a red circle"], "backend": "tensorrt-rtx", "first_row": True}
    (made,) = trt.run(with_engines("kv-update"), [case], tmp_path, SSD_FAKE_REFUSE=call)
    assert "error" not in made.facts, made.facts
    assert made.facts["step_is_captured"] == 0
    assert calls_of(tmp_path).count("run decode_step") == 24


@pytest.mark.parametrize("missing", ["libcuda.so.1", "libtensorrt_rtx.so.1"])
def test_a_missing_library_is_named(
    missing: str, trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "libraries"
    folder.mkdir()
    for library in trt.doubles.glob("lib*.so.*"):
        if library.name != missing:
            shutil.copy(library, folder / library.name)
    case = {"prompts": ["a red circle"], "backend": "tensorrt-rtx", "first_row": True}
    path = {"LD_LIBRARY_PATH": str(folder)}
    (made,) = trt.run(with_engines("kv-update"), [case], tmp_path, **path)
    wanted = {
        "libcuda.so.1": "this machine has no NVIDIA GPU, or no driver for it",
        "libtensorrt_rtx.so.1": "the backend tensorrt-rtx needs libtensorrt_rtx.so.1, which does",
    }[missing]
    assert made.facts["error"].startswith(wanted) and made.facts["status"] == UNAVAILABLE


MISUSE = (
    "calls_inside_a_callback",
    "callbacks_that_throw",
    "cancelled_after_the_present_images",
    "cancelled_at_every_row",
    "cancelled_from_another_thread",
    "destroyed_in_any_order",
    "destroyed_inside_its_callback",
    "models_again_and_again",
    "two_generations_in_two_threads",
    "two_models_in_two_threads",
)


def misuse_environment(trt: TrtBuild, bundle: Path) -> dict[str, str]:
    return {**trt.environment, **FEW_MODELS, "SSD_FAKE_BUNDLE": str(bundle)}


def test_misuse(trt: TrtBuild, with_engines: Callable[[str], Path], tmp_path: Path) -> None:
    """The first backend of the build is tensorrt."""
    bundle = with_engines("as bundled")
    run_misuse(trt.library, bundle, tmp_path, *MISUSE, **misuse_environment(trt, bundle))


class Device(ctypes.Structure):
    """ssd_device."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("available", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("backend", ctypes.c_char * 16),
        ("provider", ctypes.c_char * 16),
        ("name", ctypes.c_char * 128),
        ("reason", ctypes.c_char * 256),
        ("total_bytes", ctypes.c_uint64),
        ("free_bytes", ctypes.c_uint64),
    )


LIST = """
import ctypes, sys
from tests.engines.test_tensorrt import Device
library, count = ctypes.CDLL(sys.argv[1]), ctypes.c_size_t()
devices = (Device * 9)()
devices[0].struct_size = ctypes.sizeof(Device)
assert library.ssd_devices(devices, 9, ctypes.byref(count), None) == 0
for device in devices[:count.value]:
    print(device.backend.decode(), device.available, device.name.decode(), device.reason.decode())
"""


def listed(trt: TrtBuild, **environment: str) -> list[str]:
    library = trt.library / "libssd_runtime.so"
    ran = run(
        [sys.executable, "-c", LIST, library],
        cwd=ROOT,
        env={**trt.environment, "PYTHONPATH": str(ROOT), **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_the_devices_and_what_they_lack(trt: TrtBuild) -> None:
    assert listed(trt, SSD_FAKE_GPUS="2") == [
        "tensorrt 1 a double ",
        "tensorrt 1 a double ",
        "tensorrt-rtx 1 a double ",
        "tensorrt-rtx 1 a double ",
    ]
    without = listed(trt, LD_LIBRARY_PATH="/nowhere")
    assert [line.split()[:2] for line in without] == [["tensorrt", "0"], ["tensorrt-rtx", "0"]]
    assert all("which does not load" in line for line in without)


def test_a_library_without_onnxruntime_needs_no_tensorrt_to_load(trt: TrtBuild) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    needed = run(["readelf", "-d", trt.library / "libssd_runtime.so"]).stdout
    assert not re.search("NEEDED.*(nvinfer|tensorrt|cuda|onnxruntime)", needed)


FIND = """cmake_minimum_required(VERSION 3.18)
project(app LANGUAGES CXX)
find_package(ssd_runtime 0.1 REQUIRED COMPONENTS {backend})
"""


def test_an_installed_library_says_which_backends_it_has(trt: TrtBuild, tmp_path: Path) -> None:
    installed = run(["cmake", "--install", trt.library, "--prefix", tmp_path / "prefix"])
    assert installed.returncode == 0, installed.stderr
    (config,) = (tmp_path / "prefix").rglob("ssd_runtimeConfig.cmake")
    for backend, is_there in {"tensorrt-rtx": True, "onnxruntime": False}.items():
        project = tmp_path / backend
        project.mkdir()
        (project / "CMakeLists.txt").write_text(FIND.format(backend=backend))
        found = run(
            ["cmake", "-S", project, "-B", project / "b", f"-Dssd_runtime_DIR={config.parent}"]
        )
        assert (found.returncode == 0) == is_there, found.stderr
        assert is_there or backend in found.stderr
    (package,) = (tmp_path / "prefix").rglob("ssd_runtime.pc")
    assert "backends=tensorrt;tensorrt-rtx" in package.read_text()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("-DSSD_RUNTIME_BACKENDS=abacus", "unknown backend abacus: -DSSD_RUNTIME_BACKENDS takes"),
        ("-DSSD_RUNTIME_BACKENDS=", "no backend: -DSSD_RUNTIME_BACKENDS takes any of"),
        (
            "-DSSD_RUNTIME_BACKENDS=tensorrt-rtx",
            "the headers of TensorRT-RTX are missing: download",
        ),
    ],
)
def test_what_cannot_be_built_is_said(
    option: str, sentence: str, build: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORRT_RTX_ROOT", raising=False)
    configured = run(["cmake", "-S", ENGINES, "-B", tmp_path, option, *build.options()])
    if configured.returncode == 0:
        pytest.skip("the headers of TensorRT-RTX are installed here")
    assert sentence in one_line(configured)


SANITIZED = pytest.mark.skipif(
    "SSD_EXPORT_SANITIZERS" not in os.environ,
    reason="takes many minutes: SSD_EXPORT_SANITIZERS=1 make test TESTS=tests/engines",
)


@SANITIZED
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_misuse_under_a_sanitizer(
    sanitizer: str, build: Builds, with_engines: Callable[[str], Path], tmp_path: Path
) -> None:
    name = f"tensorrt-{sanitizer.replace(',', '-')}"
    trt = trt_build(build, name, f"-DSSD_RUNTIME_SANITIZE={sanitizer}")
    bundle, names = with_engines("as bundled"), THREADS if sanitizer == "thread" else MISUSE
    run_misuse(
        trt.library, bundle, tmp_path, *names, **misuse_environment(trt, bundle), **SUPPRESSED
    )


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_it_compiles_without_a_warning_against_every_version(
    compiler: str, build: Builds, cuda_headers: Path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}: engines/scripts/install_dependencies.sh")
    source = ROOT / "engines" / "src" / "trt" / "nvinfer.cpp"
    folders = include_folders()
    if not folders:
        pytest.skip("needs TensorRT's headers: TENSORRT_ROOT=DIR, TENSORRT_HEADERS=DIR:DIR")
    rtx = rtx_headers(build.folder) / "include"
    for include, more in [*((folder, []) for folder in folders), (rtx, ["-DSSD_TENSORRT_RTX"])]:
        compiled = run(
            [compiler, "-std=c++17", "-fsyntax-only", "-Werror", "-Wall", "-Wextra", "-Wpedantic"]
            + [
                "-Wshadow",
                "-Wconversion",
                f"-I{ROOT / 'engines' / 'src'}",
                f"-I{ROOT / 'engines' / 'include'}",
            ]
            + ["-isystem", include, "-isystem", cuda_headers, *more, source]
        )
        assert compiled.returncode == 0, f"{include}: {compiled.stderr[:2000]}"


@pytest.fixture(scope="module")
def cuda_headers(trt: TrtBuild) -> Path:
    """What the build found."""
    cache = (trt.library / "CMakeCache.txt").read_text()
    return Path(re.search(r"CUDA_INCLUDE_DIR:PATH=(.*)", cache)[1])
