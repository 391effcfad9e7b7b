"""The trt runner's lookahead has the tokens, slots and passes of ONNX Runtime's, over doubles of
CUDA and TensorRT that execute and check every run.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.model.families.janus import GRID
from ssd_export.plan import lookahead as lookahead_plan
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt.build import build_engines
from ssd_export.tensorrt.plan import BuildPlan, BuildSpec, plan_build
from ssd_export.tensorrt.step_form import AS_BUNDLED, KV_UPDATE
from ssd_export.tensorrt.target import Batch
from ssd_export.tensorrt.window_pass import PASS
from ssd_export.tensorrt.window_plan import USUAL
from tests.runtime.checkpoints import PROMPTS
from tests.runtime.test_lookahead import caches, lookahead_bundle, random_bundle
from tests.tensorrt.cuda_double import CudaDouble, CUresult
from tests.tensorrt.trt_bundles import Doubles, copied_bundle, doubles, found_doubles

pytestmark = pytest.mark.slow
WINDOW = 8


def with_windows(
    monkeypatch: pytest.MonkeyPatch, path: Path, window: int = WINDOW, **engines: object
) -> Doubles:
    return doubles(monkeypatch, path, window=window, **engines)


def assert_same_passes(
    made: Doubles, num_images: int, lookahead: int = WINDOW, **options: object
) -> None:
    """Tokens, slots and the number of passes of ONNX Runtime's lookahead; all memory given back."""
    asked = dict(num_images=1, lookahead=lookahead, **options)
    prompts = PROMPTS[:num_images]
    with ImageGenerator.from_bundle(made.path, num_threads=1) as reference:
        wanted = reference(prompts, **asked).tokens
        slots, passes = caches(reference, "position"), reference.passes
    with made.generator() as generator:
        np.testing.assert_array_equal(generator(prompts, **asked).tokens, wanted)
        assert generator.passes == passes < GRID.num_tokens - 1
        for ours, theirs in zip(caches(generator, "position"), slots, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert made.cuda.used_bytes == 0 and not made.cuda.graphs
    assert not made.cuda.alive and not made.cuda.faults


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("form", [KV_UPDATE, AS_BUNDLED])
def test_full_caches(
    form: str, num_images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_windows(monkeypatch, copied_bundle(tmp_path, "full"), form=form)
    assert_same_passes(made, num_images, seed=5, temperature=0.5)
    assert made.trt.runs.count("decode_window") > 1 and "decode_step" in made.trt.runs


@pytest.mark.parametrize("num_images", [1, 2])
def test_caches_that_evict_together(
    num_images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lookahead_bundle(0, 8, monkeypatch)
    made = with_windows(monkeypatch, Path(shutil.copytree(whole, tmp_path / "bundle")))
    assert_same_passes(made, num_images, seed=1, temperature=0.3)
    assert "evict" in made.trt.runs


@pytest.mark.parametrize("plugin", [False, True])
def test_images_that_evict_before_steps_of_their_own(
    plugin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random rules that decay scores; images leave one another behind."""
    whole = random_bundle(1, monkeypatch)
    path = Path(shutil.copytree(whole, tmp_path / "bundle"))
    made = with_windows(monkeypatch, path, plugin=plugin)
    assert_same_passes(made, 2, temperature=0)


def test_the_plugin_evicts_in_the_pass_and_leaves_no_cache_to_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lookahead_bundle(0, 8, monkeypatch)
    path = Path(shutil.copytree(whole, tmp_path / "bundle"))
    made = with_windows(monkeypatch, path, plugin=True, top_k=True)
    entry = made.trt.engines.graphs["decode_window"]
    assert set(entry.aliases) == {
        t.name for t in made.bundle.config.graphs["decode_window"].cache_outputs.values()
    }
    assert_same_passes(made, 2, seed=1, temperature=0.3)
    assert "evict" not in made.trt.runs and made.trt.runs.count("decode_window") > 1
    assert_same_passes(made, 1, seed=3, top_k=3, temperature=0.3)
    assert "decode_window_top_k" in made.trt.runs


def test_full_heads_of_images_at_other_steps_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images that are due at steps far apart, and one that is done: every head is full."""
    made = with_windows(monkeypatch, copied_bundle(tmp_path, "h2o", evict_every=24))
    chance, num_images = np.random.default_rng(0), 3
    with (
        made.generator() as generator,
        ImageGenerator.from_bundle(made.path, num_threads=1) as reference,
    ):
        for one in (generator, reference):
            next(one.stream(PROMPTS))
        runner, wanted = generator.runner, reference.runner
        due = sorted(runner._evictions & wanted._evictions.keys())
        first = np.array([due[0], GRID.num_tokens, due[-1]])
        for cache in wanted._specs["decode_step"].cache_inputs:
            values = wanted.read_cache(cache)
            if cache.kind == "position":
                order = chance.random((*values.shape[:2], 600)).argsort(axis=2)
                values = np.ascontiguousarray(order[..., : values.shape[2]], np.int32)
            elif cache.kind == "score":
                values = chance.random(values.shape, np.float32)
            for one in (runner, wanted):
                one.write_cache(cache, values)
        full = caches(reference, "position")
        for one in (runner, wanted):
            one._evict_images(first, first < GRID.num_tokens)
        for before, ours, theirs in zip(
            full, caches(generator, "position"), caches(reference, "position"), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(ours[1::num_images], before[1::num_images])
        assert any((a != b).any() for a, b in zip(full, caches(generator, "position"), strict=True))


def test_greedy_after_sampled_in_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_windows(monkeypatch, copied_bundle(tmp_path, "full"))
    with (
        made.generator() as generator,
        ImageGenerator.from_bundle(made.path, num_threads=1) as reference,
    ):
        for options in ({"seed": 2}, {"temperature": 0}, {"seed": 3, "lookahead": 4}):
            asked = {"lookahead": WINDOW, **options}
            np.testing.assert_array_equal(
                generator(PROMPTS[:2], **asked).tokens, reference(PROMPTS[:2], **asked).tokens
            )
        assert set(generator.runner._ready.window._graphs.num_nodes) == {PASS}


def test_top_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_windows(monkeypatch, copied_bundle(tmp_path, "full"), top_k=True)
    assert_same_passes(made, 2, seed=3, top_k=3, temperature=0.3)
    assert "decode_window_top_k" in made.trt.runs and "decode_window" not in made.trt.runs


def test_auto_takes_windows_and_single_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that costs a step pays until the drafts of a random model turn out wrong."""
    monkeypatch.setattr(lookahead_plan, "MORE_OPERATORS", 1.0)
    made = with_windows(monkeypatch, copied_bundle(tmp_path, "full"))
    with ImageGenerator.from_bundle(made.path, num_threads=1) as reference:
        wanted = reference(PROMPTS[:1], seed=4).tokens
    with made.generator() as generator:
        tokens = generator(PROMPTS[:1], seed=4, lookahead="auto").tokens
    np.testing.assert_array_equal(tokens, wanted)
    assert "decode_window" in made.trt.runs and "decode_step" in made.trt.runs


def test_a_pass_is_one_launch_and_one_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_windows(monkeypatch, copied_bundle(tmp_path, "full"))
    with made.generator() as generator:
        generator(PROMPTS[:1], temperature=0, lookahead=WINDOW)
        start = len(made.cuda.calls)
        generator(PROMPTS[:1], temperature=0, lookahead=WINDOW)
        names, passes = made.cuda.names()[start:], generator.passes
        assert names.count("cuGraphLaunch") == passes
        assert "cuStreamBeginCapture" not in names, "captured once for all batches of this size"
        launches = [place for place, name in enumerate(names) if name == "cuGraphLaunch"]
        for before, after in zip(launches, launches[1:], strict=False):
            waits = names[before:after].count("cuStreamSynchronize")
            assert waits <= 3, "the pass, and after a grid row its tokens and logits"
            assert names[before:after].count("cuMemcpyDtoHAsync") <= 4


def test_without_capture_passes_are_queued_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_windows(monkeypatch, copied_bundle(tmp_path, "full"), is_rtx=False)
    refused = (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
    monkeypatch.setattr(CudaDouble, "cuStreamBeginCapture", lambda self, *arguments: refused)
    with pytest.warns(RuntimeWarning, match="cannot be captured .*slower"):
        assert_same_passes(made, 1, seed=7, temperature=0.5)


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
)
def test_engines_as_they_are_really_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by TensorRT-RTX, for a GPU that is not here; only the loading and running are
    doubles.
    """
    path = copied_bundle(tmp_path, "full")
    spec = BuildSpec(path, target="rtx", flavor="tensorrt-rtx", batch=Batch(1, 1, 2))
    built = build_engines(plan_build(replace(spec, plugin="off", lookahead=WINDOW)))
    window, step = (built.graphs[name] for name in ("decode_window", "decode_step"))
    assert [profile.images for profile in window.profiles] == [(1, 1, 1), (2, 2, 2)]
    assert {profile.window for profile in window.profiles} == {WINDOW} and built.warnings == ()
    assert set(window.aliases) == set(step.aliases), "the same caches in place"
    assert {n for n in step.weights if n.startswith("layers.")} <= set(window.weights)
    assert_same_passes(found_doubles(monkeypatch, path), 2, seed=5, temperature=0.5)


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
)
def test_a_pass_without_its_kernels_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a board for which an earlier version prepared the decode step alone."""

    def of_steps(bundle: Bundle, graph: str, capabilities: tuple[int, ...]) -> bytes:
        if graph.startswith("decode_window"):
            raise UserError("no kernel images in a folder")
        return b"a graph"

    monkeypatch.setattr(build_plan, "plugin_graph", of_steps)
    spec = BuildSpec(copied_bundle(tmp_path, "full"), target="rtx", flavor="tensorrt-rtx")

    def planned(plugin: str, lookahead: int | None) -> BuildPlan:
        asked = replace(spec, plugin=plugin, lookahead=lookahead, batch=Batch(1, 1, 2))
        return plan_build(asked, library=lambda: None)

    for plugin in ("auto", "on"):
        plan = planned(plugin, None)
        assert plan.step.has_plugin and plan.window == 0 and "decode_step" in plan.step.models
        assert plan.no_window == "no kernel images in a folder"
    plain = planned("auto", WINDOW)
    assert not plain.step.has_plugin and plain.window == WINDOW
    assert "no kernel images in a folder" in plain.step.why_not
    with pytest.raises(UserError, match="no kernel images in a folder"):
        planned("on", WINDOW)
    monkeypatch.setattr(build_plan, "plugin_graph", lambda *_: b"a graph")
    plan = planned("on", None)
    assert plan.window == USUAL and set(plan.step.models) == {
        "prefill",
        "decode_step",
        "decode_window",
    }


def test_what_engines_cannot_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way_out = "build-engine --bundle .* --lookahead 16"
    for plugin in (False, True):
        path = copied_bundle(tmp_path / f"plugin {plugin}", "full")
        with (
            doubles(monkeypatch, path, plugin=plugin).generator() as generator,
            pytest.raises(UserError, match=f"these engines take one token a pass; .*{way_out}"),
        ):
            generator(PROMPTS[:1], lookahead=8)
    made = with_windows(monkeypatch, copied_bundle(tmp_path / "again", "full"))
    with made.generator() as generator:
        with pytest.raises(
            UserError, match="up to 8 tokens, not 9; use --lookahead 8, or build-en"
        ):
            generator(PROMPTS[:1], lookahead=9)
        with pytest.raises(
            UserError, match="no engine for grid rows in parallel; use --runner ort"
        ):
            generator(PROMPTS[:1], lookahead="zipar:12")
