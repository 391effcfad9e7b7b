"""The trt runner generates the ort runner's tokens, over doubles of CUDA and TensorRT that execute
and check every run.

What only a GPU can show is in benchmarks/gpu_report.py: TensorRT's own arithmetic, real
graphs, speed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ssd_export.graph_spec import CacheTensor
from ssd_export.model.families.janus import GRID
from ssd_export.policy.presets import POLICIES
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.step_form import AS_BUNDLED, KV_UPDATE
from ssd_export.tensorrt.step_graphs import EVICT_AND_STEP, STEP
from ssd_export.tensorrt.target import Batch
from tests.runtime.checkpoints import PROMPTS
from tests.tensorrt.cuda_double import CudaDouble, CUresult
from tests.tensorrt.trt_bundles import Doubles, copied_bundle, doubles, found_doubles
from tests.tensorrt.trt_double import CAPABILITY, VERSION

pytestmark = pytest.mark.slow

WAITING = {
    "cuStreamSynchronize",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuMemAlloc",
    "cuMemFree",
}


def ort_tokens(path: Path, **options: object) -> tuple[np.ndarray, ImageGenerator]:
    generator = ImageGenerator.from_bundle(path, num_threads=1)
    return generator(PROMPTS[:2], **options).tokens, generator


def assert_same_image(made: Doubles, **options: object) -> None:
    """The same tokens, and at the end the same tokens in the same slots."""
    wanted, reference = ort_tokens(made.path, **options)
    with made.generator() as generator:
        np.testing.assert_array_equal(generator(PROMPTS[:2], **options).tokens, wanted)
        for layer, groups in enumerate(generator.table.layers):
            for cache in (CacheTensor(layer, index, "position") for index in range(len(groups))):
                ours, theirs = (one.runner.read_cache(cache) for one in (generator, reference))
                np.testing.assert_array_equal(ours, theirs, cache.past)
    assert made.cuda.used_bytes == 0 and not made.cuda.graphs, "everything is given back"
    assert not made.cuda.alive and not made.cuda.faults


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "ssd-auto"])
def test_same_tokens_and_slots_for_every_policy(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_image(doubles(monkeypatch, copied_bundle(tmp_path, policy)), seed=7)


@pytest.mark.parametrize("policy", ["full", "ssd-row", "linear"])
def test_same_tokens_with_the_plugin_which_evicts_by_itself(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path, policy), plugin=True)
    assert_same_image(made, seed=8)
    assert "evict" not in made.trt.runs


def test_tensorrt_itself_and_greedy_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the bundle's own form, whose rounding in float16 is ONNX Runtime's."""
    path = copied_bundle(tmp_path, dtype="fp16")
    made = doubles(monkeypatch, path, is_rtx=False, form=AS_BUNDLED)
    assert_same_image(made, temperature=0)


@pytest.mark.parametrize("policy", ["ssd-row", "full"])
def test_the_bundle_s_own_form_generates_the_same(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_image(
        doubles(monkeypatch, copied_bundle(tmp_path, policy), form=AS_BUNDLED), seed=7
    )


@pytest.mark.parametrize(
    "stored",
    [{"kv_dtype": "int8"}, {"weights": "int4", "dtype": "fp16"}],
    ids=["int8 cache", "int4 weights"],
)
def test_same_tokens_with_quantized_caches_and_weights(
    stored: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path, **stored), form=AS_BUNDLED)
    with (
        made.generator() as generator,
        ImageGenerator(made.bundle, OrtRunner(made.bundle, exact=True)) as reference,
    ):
        np.testing.assert_array_equal(
            generator(PROMPTS[:2], seed=7).tokens, reference(PROMPTS[:2], seed=7).tokens
        )


def test_top_k_where_its_engines_were_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path, "h2o"), top_k=True)
    assert_same_image(made, seed=3, top_k=5)
    assert {"prefill_top_k", "decode_step_top_k"} <= set(made.trt.runs)
    assert made.trt.runs.count("prefill") == 0


def test_a_grid_row_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    generator = made.generator()
    events = generator.stream(PROMPTS[:2], seed=1)
    for row in range(GRID.width):
        start = len(made.cuda.calls)
        event = next(events)
        names = made.cuda.names()[start:]
        launches = [place for place, name in enumerate(names) if name == "cuGraphLaunch"]
        assert len(launches) == GRID.width - (row == 0), "a launch for every token"
        assert not WAITING & set(names[launches[0] : launches[-1]]), "a row waits for the host"
        after = [name for name in names[launches[-1] :] if name in WAITING]
        assert after[:2] == ["cuMemcpyDtoHAsync", "cuStreamSynchronize"], (
            "the tokens are read once, after the row"
        )
        assert after.count("cuMemcpyDtoHAsync") <= 2 or row == GRID.width - 1, "tokens and logits"
        assert (event.tokens[:, : (event.row + 1) * GRID.width].any(axis=1)).all()
        assert not event.tokens[:, (event.row + 1) * GRID.width :].any(), (
            "the row to come is not generated yet"
        )
    assert set(generator.runner.graph_nodes()) == {STEP, EVICT_AND_STEP}, "two graphs serve all"
    assert made.cuda.names().count("cuStreamBeginCapture") == 2
    steps = made.trt.runs.count("decode_step")
    assert steps == GRID.width * GRID.width - 1 + 1, "575 steps and the trial run"


def test_a_step_is_captured_once_and_copies_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with doubles(monkeypatch, copied_bundle(tmp_path, "full")).generator() as generator:
        generator(PROMPTS[:1])
        assert generator.runner.graph_nodes() == {STEP: 2}, (
            "the engine, and one copy of step, tokens and positions"
        )


def test_images_are_generated_from_any_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context is current for one thread; the doubles refuse every call without one."""
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    wanted, _ = ort_tokens(made.path, seed=9)
    generator = made.generator()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        generated = first.submit(generator, PROMPTS[:2], seed=9).result()
        again = second.submit(generator, PROMPTS[:2], seed=9).result()
        second.submit(generator.runner.close).result()
    np.testing.assert_array_equal(generated.tokens, wanted)
    np.testing.assert_array_equal(again.tokens, wanted)
    assert not made.cuda.alive and not made.cuda.faults and made.cuda.used_bytes == 0


@pytest.mark.parametrize("fails", ["cuStreamSynchronize", "cuGraphExecDestroy", "cuMemFree"])
def test_closing_goes_on_after_an_error(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the device is given back, engines before memory, and the error is raised."""
    made = doubles(monkeypatch, copied_bundle(tmp_path))
    generator = made.generator()
    generator(PROMPTS[:1])
    real = getattr(CudaDouble, fails)

    def failing(self: CudaDouble, *arguments: object) -> tuple[object, ...]:
        real(self, *arguments)
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)

    monkeypatch.setattr(CudaDouble, fails, failing)
    with pytest.raises(RuntimeError, match=fails):
        generator.runner.close()
    assert not made.cuda.alive and "cuDevicePrimaryCtxRelease" in made.cuda.names()
    assert made.cuda.used_bytes == 0


def test_without_capture_steps_are_queued_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path), is_rtx=False)
    refused = (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
    monkeypatch.setattr(CudaDouble, "cuStreamBeginCapture", lambda self, *arguments: refused)
    with pytest.warns(RuntimeWarning, match="cannot be captured .*slower"):
        assert_same_image(made, seed=7)
    assert "cuGraphLaunch" not in made.cuda.names()


def test_step_by_step_equals_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd_export.runtime.runner import Runner

    made = doubles(monkeypatch, copied_bundle(tmp_path))
    wanted = made.generator()(PROMPTS[:2], seed=2).tokens
    generator = made.generator()
    monkeypatch.setattr(type(generator.runner), "decode_row", Runner.decode_row)
    np.testing.assert_array_equal(generator(PROMPTS[:2], seed=2).tokens, wanted)


def test_images_beyond_the_engine_s_batch_are_generated_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path), images=(1, 1, 2))
    wanted = ImageGenerator.from_bundle(made.path, num_threads=1)(PROMPTS, seed=5)
    with made.generator() as generator:
        generated = generator(PROMPTS, seed=5)
    np.testing.assert_array_equal(generated.tokens, wanted.tokens)
    for ours, theirs in zip(generated.images, wanted.images, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert made.cuda.names().count("cuMemAlloc") == 5, (
        "the weights once, and for each batch size its buffers and its seeds"
    )
    assert made.cuda.used_bytes == 0


@pytest.mark.parametrize("count, runs", [(5, 3), (1, 1), (2, 1)])
def test_images_are_decoded_as_many_at_once_as_the_engine_takes(
    count: int, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles(monkeypatch, copied_bundle(tmp_path, "full"), images=(2, 2, 4), decoder_images=2)
    tokens = np.random.default_rng(0).integers(0, 200, (count, GRID.width * GRID.width))
    runner = made.runner()
    wanted = ImageGenerator.from_bundle(made.path, num_threads=1).runner.decode_image(tokens)
    np.testing.assert_array_equal(runner.decode_image(tokens), wanted)
    assert made.trt.runs.count("image_decoder") == runs


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_engines_as_they_are_really_built(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """engine.json, files and lifted weights of a build with TensorRT-RTX; only the loading and
    running are doubles.
    """
    from ssd_export.bundle import open_bundle
    from ssd_export.tensorrt import runner as trt_runner
    from ssd_export.tensorrt.build import build_engines
    from ssd_export.tensorrt.engine_files import find_engines
    from ssd_export.tensorrt.plan import BuildSpec, plan_build
    from ssd_export.verify.verify import VerifySpec, verify

    path = copied_bundle(tmp_path, dtype=dtype)
    values = build_engines(
        plan_build(
            BuildSpec(path, target="rtx", flavor="tensorrt-rtx", plugin="off", batch=Batch(1, 1, 2))
        )
    )
    assert CAPABILITY in values.compute_capabilities and values.version == VERSION
    files = find_engines(open_bundle(path), CAPABILITY)
    assert files.flavor.trt.Runtime is not None and len(files.all_weights()) > 8
    made = found_doubles(monkeypatch, path)
    assert made.trt.engines.form == KV_UPDATE
    if dtype == "fp32":
        assert_same_image(made, seed=7)
    else:  # sums in float32 where ONNX Runtime's form has them in float16: other tokens at ties
        opened = (find_engines(made.bundle, CAPABILITY), CudaDevice(made.cuda))
        monkeypatch.setattr(trt_runner, "open_device", lambda bundle: opened)
        ladder = verify(VerifySpec(path, against="trt"))
        assert ladder["ok"], [rung for rung in ladder["rungs"] if not rung["ok"]]
    assert {"prefill", "decode_step", "evict", "image_decoder"} == set(made.trt.runs)
