"""Janus-Pro-1B's shape with one layer and its whole image decoder: every target's numbers build, and
nothing that an engine shares in place is read after it is overwritten.

Needs TensorRT-RTX, which builds without a GPU. A target that it does not build for lends its numbers
(batch, images of the decoder, workspace) to one that it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import pytest

from benchmarks import synthetic_checkpoint
from ssd_export.bundle import open_bundle
from ssd_export.model.families import PUBLISHED
from ssd_export.tensorrt import plan as build_plan
from ssd_export.tensorrt.build_graph import build_graph
from ssd_export.tensorrt.in_place import in_place
from ssd_export.tensorrt.layer_listing import hazards, unordered_dependencies
from ssd_export.tensorrt.messages import logger
from ssd_export.tensorrt.plan import BuildPlan, BuildSpec, plan_build
from ssd_export.tensorrt.target import Batch, read_target, target_names

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install ssd-export[rtx]"
    ),
]
ONE_LAYER = replace(PUBLISHED["janus-pro-1b"], vocab_size=1024, num_layers=1)
LENDER = "ada"


def numbers(target: str) -> tuple[Batch, int, int]:
    recipe = read_target(target)
    return recipe.batch, recipe.decoder_images, recipe.workspace_mib


TARGETS = sorted(set(target_names()) - {"cpu"})
LIKE = {target: min(o for o in TARGETS if numbers(o) == numbers(target)) for target in TARGETS}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two head groups, of which one releases a grid row at a time: an evict graph is there."""
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
            path, LENDER, plugin="off", batch=recipe.batch, workspace_mib=recipe.workspace_mib
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


@pytest.mark.parametrize("graph", ["decode_step", "evict"])
def test_what_is_shared_in_place_is_read_before_it_is_overwritten(
    path: Path, tmp_path: Path, graph: str
) -> None:
    """With all that the graph's contract aliases, the builder's engine would be wrong."""
    made = plan(path, "ada")
    spec = next(spec for spec in made.graphs if spec.name == graph)
    build_graph(made, spec, tmp_path, lambda *told: None, Event())
    profiles = logger(made.flavour.trt)[1].layers(len(made.profiles(graph)))
    assert len(profiles) == len(made.profiles(graph))
    for layers in profiles:
        assert unordered_dependencies(layers) == [], "the listing is understood"
        assert hazards(layers, in_place(spec, has_plugin=False)) == []
        assert hazards(layers, spec.aliases), "else this test shows nothing"


def test_an_unsafe_alias_fails_the_build(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.errors import UserError
    from ssd_export.tensorrt import build_graph as module

    made = plan(path, "ada")
    spec = next(spec for spec in made.graphs if spec.name == "evict")
    monkeypatch.setattr(module, "in_place", lambda spec, has_plugin: spec.aliases)
    with pytest.raises(UserError, match="evict would overwrite what it still reads .* same kernel"):
        build_graph(made, spec, tmp_path, lambda *told: None, Event())
    assert open_bundle(path).hash == made.bundle.hash
