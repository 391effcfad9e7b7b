"""Janus-Pro-1B's shape with one layer and its whole image decoder: every target's numbers build,
and nothing that an engine shares in place is read after it is overwritten, and a decode step reads
every cache once.

Needs TensorRT-RTX, which builds without a GPU. A target that it does not build for lends its
numbers (batch, images of the decoder, workspace) to one that it does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import pytest

from benchmarks import synthetic_checkpoint
from ssd_export.model.families import PUBLISHED
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt.build_graph import GraphEngine, build_graph
from ssd_export.tensorrt.cache_traffic import (
    OF_ROWS,
    cache_copies,
    cache_reads,
    moved_bytes,
    read_too_often,
    wasted_traffic,
)
from ssd_export.tensorrt.layer_listing import Layer, hazards, unordered_dependencies
from ssd_export.tensorrt.messages import logger
from ssd_export.tensorrt.plan import BuildPlan, BuildSpec, StepPlan, plan_build
from ssd_export.tensorrt.step_form import AS_BUNDLED, in_place, num_elements
from ssd_export.tensorrt.target import Batch, read_target, target_names

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
    ),
]
ONE_LAYER = replace(PUBLISHED["janus-pro-1b"], vocab_size=1024, num_layers=1)
LENDER, WINDOW = "ada", 16
MAX_TRAFFIC = 1.3  # of the bytes of weights and caches, read once


def numbers(target: str) -> tuple[Batch, int, int]:
    recipe = read_target(target)
    return recipe.batch, recipe.decoder_images, recipe.workspace_mib


TARGETS = sorted(set(target_names()) - {"cpu"})
LIKE = {target: min(o for o in TARGETS if numbers(o) == numbers(target)) for target in TARGETS}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two head groups, of which one evicts a grid row at a time: an evict graph is there."""
    from ssd_export.export.temporary_bundle import PolicyChoice, temporary_bundle

    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic_checkpoint.SHAPES, "one layer", ONE_LAYER)
        patch.setattr(build_plan, "gpu_here", lambda: None)
        model = synthetic_checkpoint.write_checkpoint(
            folder / "checkpoint", "one layer", "transformers", "fp16"
        )
        choice = PolicyChoice(str(model), "h2o", 0.2, dtype="fp16", evict_every=24)
        with temporary_bundle(choice) as made:
            yield made


def plan(path: Path, target: str) -> BuildPlan:
    """A plan with the numbers of a target, for a GPU that TensorRT-RTX builds for."""
    recipe = read_target(target)
    made = plan_build(
        BuildSpec(
            path,
            LENDER,
            plugin="off",
            batch=recipe.batch,
            workspace_mib=recipe.workspace_mib,
            lookahead=WINDOW,
        )
    )
    return replace(made, target=replace(made.target, decoder_images=recipe.decoder_images))


@pytest.mark.parametrize("target", sorted(set(LIKE.values())))
def test_the_numbers_of_every_target_build(path: Path, tmp_path: Path, target: str) -> None:
    for spec in plan(path, target).graphs:
        made = build_graph(plan(path, target), spec, tmp_path, lambda *told: None, Event())
        assert made.entry.bytes > 0 and made.warnings == []


def test_no_target_is_left_out() -> None:
    assert set(LIKE) == set(TARGETS) and all(numbers(o) == numbers(t) for t, o in LIKE.items())


def built(made: BuildPlan, graph: str, tmp_path: Path) -> tuple[GraphEngine, list[list[Layer]]]:
    """An engine and its layers, profile by profile."""
    spec = next(spec for spec in made.graphs if spec.name == graph)
    engine = build_graph(made, spec, tmp_path, lambda *told: None, Event())
    profiles = logger(made.flavor.trt)[1].layers(len(made.profiles(graph)))
    assert len(profiles) == len(made.profiles(graph))
    return engine, profiles


@pytest.mark.parametrize("graph", ["decode_step", "decode_window", "evict"])
def test_what_is_shared_in_place_is_read_before_it_is_overwritten(
    path: Path, tmp_path: Path, graph: str
) -> None:
    """With all that the graph's contract aliases, the builder's engine would be wrong."""
    made = plan(path, "ada")
    spec = made.bundle.config.graphs[graph]
    for layers in built(made, graph, tmp_path)[1]:
        assert unordered_dependencies(layers) == [], "the listing is understood"
        assert hazards(layers, in_place(spec, made.step.form)) == []
        assert hazards(layers, spec.aliases), "else this test shows nothing"


def test_a_step_reads_every_cache_once_and_copies_none(path: Path, tmp_path: Path) -> None:
    engine, profiles = built(plan(path, "ada"), "decode_step", tmp_path)
    for layers in profiles:
        assert wasted_traffic(layers, engine.entry.weights) == [] and engine.warnings == []
        assert {len(readers) for readers in cache_reads(layers).values()} == {1}


def test_a_prefill_writes_its_keys_and_values_into_the_caches(path: Path, tmp_path: Path) -> None:
    """By the kernels that make them: no layer reads a cache or copies one."""
    engine, profiles = built(plan(path, "ada"), "prefill", tmp_path)
    assert engine.warnings == [] and engine.entry.aliases
    for layers in profiles:
        assert unordered_dependencies(layers) == [] == hazards(layers, engine.entry.aliases)
        assert cache_copies(layers) == [] and cache_reads(layers) == {}
        for present in engine.entry.aliases:
            assert sum(layer.writes(present) for layer in layers) == 1


def traffic(made: BuildPlan, tmp_path: Path) -> float:
    """Bytes that a step of eight images moves, by those of its weights and caches read once; of one
    image a single layer's caches are a hundredth of its weights, and a copy of them is not seen.
    """
    made = replace(made, batch=Batch(8, 8, 8))
    engine, (layers,) = built(made, "decode_step", tmp_path)
    weights = sum(weight.num_bytes for weight in engine.entry.weights.values())
    step = made.bundle.config.graphs["decode_step"]
    caches = (t for c, t in step.cache_inputs.items() if c.kind in OF_ROWS)
    rows = 8 * made.bundle.config.model.rows_per_image
    least = weights + sum(2 * num_elements(tensor, {"rows": rows}) for tensor in caches)
    return moved_bytes(layers) / least


def test_a_step_moves_little_beside_its_weights_and_caches(path: Path, tmp_path: Path) -> None:
    made = plan(path, "ada")
    assert 1 < traffic(made, tmp_path) < MAX_TRAFFIC
    assert traffic(replace(made, step=StepPlan(AS_BUNDLED)), tmp_path) > MAX_TRAFFIC


def test_the_bundle_s_own_form_moves_caches_several_times(path: Path, tmp_path: Path) -> None:
    """Why there is another form: this is what the checks above say of an engine without it."""
    made = replace(plan(path, "ada"), step=StepPlan(AS_BUNDLED))
    spec = made.bundle.config.graphs["decode_step"]
    for layers in built(made, "decode_step", tmp_path)[1]:
        assert cache_copies(layers) and read_too_often(layers)
        shared = in_place(spec, AS_BUNDLED)
        assert hazards(layers, shared) == [] == unordered_dependencies(layers)
        together = [layer for layer in layers if layer.kind != "wait"]
        move = r"__myl_Move_myl\d_\d+ \(stream 1\) reads past_key_values.* overwrites"
        assert re.match(move, hazards(together, shared)[0]), "as if no stream waited for another"
        assert unordered_dependencies(together)


def test_a_pass_of_lookahead_copies_a_cache_and_reorders_it_once(
    path: Path, tmp_path: Path
) -> None:
    """KV-cache-update layers write neighboring slots only, which a window's slots are not."""
    engine, profiles = built(plan(path, "ada"), "decode_window", tmp_path)
    assert engine.warnings == []
    for layers in profiles:
        copied = Counter(told.rpartition(".")[2] for told in cache_copies(layers))
        assert set(copied) == {"key", "value"} and max(copied.values()) <= 2
        assert max(map(len, cache_reads(layers).values())) <= 2
