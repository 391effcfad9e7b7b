"""What the trt runner refuses, each in one line that says what to do, and before it allocates or
loads anything.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssd_export.errors import UserError
from ssd_export.runtime.runners import open_runner
from ssd_export.tensorrt import engine_files
from ssd_export.tensorrt import runner as trt_runner
from ssd_export.tensorrt.cuda_device import CudaDevice, open_driver
from ssd_export.tensorrt.engine_files import EngineFiles, find_engines
from ssd_export.tensorrt.messages import logger
from tests.runtime.checkpoints import PROMPTS
from tests.tensorrt.cuda_double import CudaDouble
from tests.tensorrt.engine_doubles import PLUGIN_LIBRARY, write_engines
from tests.tensorrt.trt_bundles import copied_bundle, doubles
from tests.tensorrt.trt_double import ContextDouble, EngineDouble, RuntimeDouble, Severity

REBUILD = "build it here: ssd-export build-engine --bundle "


def refused(action: Any) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_a_gpu_the_onnxruntime_runner_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    monkeypatch.setattr(trt_runner, "gpu_here", lambda: None)
    assert "--runner ort" in refused(lambda: open_runner(made.bundle, "trt"))
    assert "--runner ort" in refused(lambda: CudaDevice(CudaDouble(has_gpu=False)))


def test_a_bundle_without_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd_export.bundle import open_bundle

    monkeypatch.setattr(trt_runner, "gpu_here", lambda: 89)
    message = refused(lambda: open_runner(open_bundle(copied_bundle(tmp_path)), "trt"))
    assert "has no TensorRT engines" in message and REBUILD in message


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"compute_capabilities": [120]},
            "for GPUs of compute capability 12.0 and this one has 8.9",
        ),
        (
            {"version": "1.6.0.1"},
            "built with tensorrt-rtx 1.6.0.1 and tensorrt-rtx 1.7.1.116 is here",
        ),
        ({"bundle_hash": "0" * 64}, "built from another bundle than"),
        ({"os": "plan9"}, "for plan9"),
    ],
)
def test_engines_of_elsewhere_are_never_loaded(
    changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path), **changes)
    message = refused(made.runner)
    assert reason in message and REBUILD in message
    assert made.trt.runs == [] and "cuMemAlloc" not in made.cuda.names()


def test_the_reason_is_that_of_the_engines_for_this_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path), version="1.6.0.1")
    write_engines(made.path, flavor="tensorrt", compute_capabilities=[75])
    from ssd_export.bundle import open_bundle

    assert "built with tensorrt-rtx 1.6.0.1" in refused(
        lambda: find_engines(open_bundle(made.path), 89)
    )


def test_a_flavor_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    monkeypatch.setattr(engine_files, "is_installed", lambda name: False)
    assert "need tensorrt-rtx, which is not installed: pip install ssd-export[rtx]" in refused(
        made.runner
    )


def test_cuda_python_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert 'pip install "cuda-bindings>=' in refused(open_driver)


def test_a_plugin_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path), plugin=True, in_engine=False)
    message = refused(made.runner)
    assert (
        "the engines need the plugin library" in message
        and PLUGIN_LIBRARY in message
        and REBUILD in message
    )
    assert "cuMemAlloc" not in made.cuda.names()


def test_a_plugin_library_beside_the_engine_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path, "full"), plugin=True, in_engine=False)
    (folder,) = {
        name.rsplit("/", 1)[0] for name in made.bundle.files if name.startswith("engines/")
    }
    made.bundle = made.bundle.add_files({f"{folder}/{PLUGIN_LIBRARY}": b"library"})
    registered: list[tuple[Path, tuple[str, ...]]] = []
    monkeypatch.setattr(
        engine_files,
        "load_library",
        lambda flavor, library, names: registered.append((library, tuple(names))),
    )
    made.runner().close()
    library = (made.path / folder / PLUGIN_LIBRARY).resolve()
    assert registered == [(library, ("DecodeAttention",))], "all that engines of one token need"


def test_a_batch_outside_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path), images=(2, 2, 4))
    with made.generator() as generator:
        message = refused(lambda: generator(PROMPTS[:1]))
        assert "generates 2 to 4 images at once, not 1" in message and "--batch 1:2:4" in message


def test_top_k_without_its_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with doubles(monkeypatch, copied_bundle(tmp_path)).generator() as generator:
        message = refused(lambda: generator(PROMPTS[:1], top_k=5))
    assert "has no engine of prefill_top_k" in message and "--top-k" in message


def test_more_codes_than_tensorrt_sorts() -> None:
    message = refused(lambda: trt_runner.limited_top_k(np.array([5, 3841]), 16_384))
    assert "top_k 3841 is above 3840" in message and "--runner ort" in message
    np.testing.assert_array_equal(
        trt_runner.limited_top_k(np.array([3840, 16_384, 10**6, 0]), 16_384), [3840, 0, 0, 0]
    )


@pytest.mark.parametrize(
    "total, what", [(300_000, "the model needs"), (700_000, "a batch of 2 needs")]
)
def test_too_little_device_memory_is_known_before_the_allocation(
    total: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    made.cuda.total_bytes = total
    message = refused(lambda: made.generator()(PROMPTS[:2]))
    assert (
        what in message
        and "MiB are free" in message
        and "smaller --budget" in message
        and "--runner ort" in message
    )
    assert made.cuda.names().count("cuMemAlloc") == (what != "the model needs")


def test_an_engine_that_tensorrt_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    made.trt.contents.clear()
    with made.generator() as generator:
        message = refused(lambda: generator(PROMPTS[:1]))
    assert "TensorRT cannot load" in message and "no such engine" in message


def test_an_engine_with_other_tensors_than_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    made.trt.contents = dict.fromkeys(made.trt.contents, "image_decoder")
    with made.generator() as generator:
        assert "has other tensors than the bundle says" in refused(lambda: generator(PROMPTS[:1]))


def test_an_engine_that_overwrites_another_input_than_engine_json_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    declared = {"present.0.0.key": "past_key_values.0.1.key"}
    monkeypatch.setattr(
        EngineDouble, "get_aliased_input_tensor", lambda self, name: declared.get(name)
    )
    with made.generator() as generator:
        message = refused(lambda: generator(PROMPTS[:1]))
    assert "engine has other tensors than the bundle says (present.0.0.key)" in message


@pytest.mark.parametrize(
    "aliases",
    [
        {"present.0.0.key": "past_key_values.0.1.key"},
        {"present.0.0.key": "nowhere"},
        {"logits": "noise"},
    ],
    ids=["another shape", "no input", "another tensor"],
)
def test_an_output_is_laid_over_nothing_but_its_input(
    aliases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    monkeypatch.setattr(EngineFiles, "aliases", lambda self, graph: aliases)
    with made.generator() as generator:
        message = refused(lambda: generator(PROMPTS[:1]))
    assert f"other tensors than the bundle says ({next(iter(aliases))}" in message


def test_weights_have_the_shape_that_the_engine_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    shapes = EngineDouble.get_tensor_shape
    turned = {"layers.0.qkv"}
    monkeypatch.setattr(
        EngineDouble,
        "get_tensor_shape",
        lambda self, name: shapes(self, name)[:: -1 if name in turned else 1],
    )
    with made.generator() as generator:
        message = refused(lambda: generator(PROMPTS[:1]))
    assert "prefill.engine has other tensors than the bundle says (layers.0.qkv)" in message


def test_what_tensorrt_warns_of_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path, "full"))
    load = RuntimeDouble.deserialize_cuda_engine
    text = "Using an engine plan file across different models of devices is not recommended"

    def warning(self: RuntimeDouble, serialized_engine: object) -> object:
        self._log.log(Severity.WARNING, text)
        return load(self, serialized_engine)

    monkeypatch.setattr(RuntimeDouble, "deserialize_cuda_engine", warning)
    with made.generator() as generator:
        generator(PROMPTS[:1])
    told = [record.getMessage() for record in caplog.records if text in record.getMessage()]
    assert f"prefill: {text}" in told and len(told) == len(set(told)) == 3


def test_an_engine_file_that_was_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    (folder,) = {
        name.rsplit("/", 1)[0] for name in made.bundle.files if name.startswith("engines/")
    }
    made.bundle = made.bundle.add_files(
        {f"{folder}/prefill.engine": b"the engine of another build"}
    )
    with made.generator() as generator:
        assert "prefill.engine is not the engine that engine.json describes" in refused(
            lambda: generator(PROMPTS[:1])
        )


def test_a_reason_is_that_of_the_call_it_is_given_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One logger hears all engines: what another one said before is no reason for this one."""
    made = doubles(monkeypatch, copied_bundle(tmp_path, "full"))
    with made.generator() as generator:
        generator(PROMPTS[:1])
        messages = logger(made.trt)[1]
        messages.errors.append("IRuntime: an error of an engine before")
        monkeypatch.setattr(ContextDouble, "execute_async_v3", lambda self, stream_handle: False)
        with pytest.raises(RuntimeError, match="refused a run of prefill: it gave no reason"):
            generator(PROMPTS[:1])


def test_what_tensorrt_does_not_capture_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path, "full"))
    monkeypatch.setattr(ContextDouble, "is_stream_capturable", lambda self, stream: False)
    with (
        made.generator() as generator,
        pytest.warns(RuntimeWarning, match="cannot be captured .*one by one, which is slower"),
    ):
        generator(PROMPTS[:1])


def test_an_array_of_another_shape_is_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doubles(monkeypatch, copied_bundle(tmp_path, "full")).generator() as generator:
        generator(PROMPTS[:1])
        with pytest.raises(ValueError, match="tokens is int32"):
            generator.runner._ready.memory.upload("tokens", np.zeros(3, np.int32))


BOARD = """
import subprocess
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "triton",
            "transformers", "matplotlib", "huggingface_hub", "ml_dtypes",
        }:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import ssd_export.tensorrt.runner, ssd_export.runtime.generate
import ssd_export.runtime.images, ssd_export.cli.progress
from ssd_export.tensorrt import runner as trt_runner
trt_runner.gpu_here = lambda: None
from ssd_export.cli.main import main
main(["generate", "a red circle", "--runner", "trt", "--bundle", sys.argv[1], "--out", sys.argv[2]])
"""


def test_a_board_generates_without_the_exporter_s_packages(tmp_path: Path) -> None:
    """numpy, click, rich, pillow, tokenizers, TensorRT and cuda-python are what
    docs/how-to/deploy-jetson.md asks for.
    """
    command = [
        sys.executable,
        "-c",
        BOARD,
        str(copied_bundle(tmp_path, "full")),
        str(tmp_path / "out.png"),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 1 and "this machine has no NVIDIA GPU" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
