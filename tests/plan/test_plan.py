"""The plan's arithmetic: parts add up, quantized codes count where they are, --fit gives up what it
says in order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from ssd_export.bundle.bundle import open_bundle
from ssd_export.cli.plan import (
    Device,
    PlanSpec,
    commands,
    find_device,
    plan_of,
    what_does_not_fit,
)
from ssd_export.errors import UserError
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.machine import gib
from ssd_export.model.families import PUBLISHED, published_shape
from ssd_export.plan.fit import Settings, fit
from ssd_export.plan.stages import BUILD_ON_DEVICE, Plan, time_class
from ssd_export.tensorrt.build_memory import needed_bytes
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.target import read_target

ONE_B, SEVEN_B = "janus-pro-1b", "janus-pro-7b"

SPEC = PlanSpec("janus-pro-1b", None, None, None, None, "model", None, 1, None, "fp16", None)
ORIN = Device("Orin", 7 << 30, "tensorrt")
UNQUANTIZED = Settings("none", 0.2, 1)


@cache
def plan(settings: Settings = UNQUANTIZED, device: Device = ORIN, **changes: object) -> Plan:
    return plan_of(PlanSpec(**{**SPEC.__dict__, **changes}), device, settings)


def test_the_published_shapes_are_those_of_their_size() -> None:
    """Parameters for images alone: 1.528 B and 6.634 B."""
    assert plan().sizes.total == pytest.approx(2 * 1.528e9, rel=1e-3)
    assert plan(model="deepseek-ai/Janus-Pro-7B").sizes.total == pytest.approx(
        2 * 6.634e9, rel=1e-3
    )
    assert published_shape("deepseek-community/Janus-Pro-1B") == PUBLISHED["janus-pro-1b"]
    assert published_shape("someone/else") is None


def test_parts_add_up() -> None:
    made = plan(Settings("none", 0.2, 4))
    device = made.device
    assert device.total == sum(size for _, size in device.parts())
    assert device.cache == made.cache_bytes == made.table.cache_bytes(made.config, 2, rows=8)
    assert set(device.keys_and_values) == {"by position", "by score"}
    assert device.weights == made.sizes.total - made.sizes.embeddings


def test_each_choice_takes_less() -> None:
    big = plan(Settings("none", 0.2, 4))
    assert plan(Settings("none", 0.1, 4)).cache_bytes < big.cache_bytes
    assert plan(Settings("none", 0.2, 1)).cache_bytes == big.cache_bytes // 4
    assert (
        plan(Settings("int4", 0.2, 4)).device.weights
        < plan(Settings("int8", 0.2, 4)).device.weights
    )
    assert plan(Settings("none", 0.2, 4), kv_dtype="int8").cache_bytes < 0.6 * big.cache_bytes
    assert plan(Settings("none", 0.2, 4), num_layers=3).sizes.steps < big.sizes.steps / 3


def test_quantized_codes_stand_in_every_engine() -> None:
    """TensorRT-RTX keeps a dequantized constant inside an engine; other weights are inputs of
    prefill, decode step and pass of lookahead.
    """
    made = plan(Settings("int4", 0.2, 1), head_weights="none")
    assert made.sizes.codes == pytest.approx(1.233e9 / 2, rel=1e-3)
    assert made.device.weights == made.sizes.steps + 3 * made.sizes.codes + made.sizes.image_decoder


def test_a_bundle_for_lookahead_counts_the_engine_of_a_pass() -> None:
    usual = plan(Settings("int4", 0.2, 1))
    made, ahead = (
        replace(usual, table=replace(usual.table, lookahead=lookahead)) for lookahead in (None, 16)
    )
    logits = 4 * 3 * 2 * made.config.codebook_size
    assert ahead.device.weights == made.device.weights + made.sizes.codes
    assert ahead.device.activations == made.device.activations + 15 * logits
    assert ahead.engine_bytes == made.engine_bytes + made.sizes.codes


@pytest.mark.slow
def test_the_head_counts_in_its_format() -> None:
    """Codes of half a byte, a scale of two bytes for 128 inputs, instead of two bytes a number."""
    kept, smaller = (
        plan(Settings("int4", 0.2, 1), head_weights=head).sizes for head in ("none", "int4")
    )
    numbers = 2048 * (16384 + 2048 + 2048)
    assert smaller.codes - kept.codes == numbers // 2
    assert kept.steps - smaller.steps == 2 * (numbers - numbers // 128)
    assert plan(Settings("int4", 0.2, 1)).sizes.codes > kept.codes


def test_fit_gives_up_the_batch_then_the_budget_then_precision() -> None:
    def needed(made: Plan) -> int:
        return made.device.total

    whole = plan(Settings("none", 0.2, 16)).device.total
    assert fit(plan, needed, whole)[0] == Settings("none", 0.2, 16)
    assert fit(plan, needed, whole - 1)[0] == Settings("none", 0.2, 8)
    assert fit(plan, needed, plan(Settings("none", 0.2, 1)).device.total - 1)[0].budget == 0.15
    settings, made = fit(plan, needed, plan(Settings("none", 0.1, 1)).device.total - 1)
    assert settings.weights == "int4" and settings.budget == 0.2 and needed(made) < 7 << 30
    assert fit(plan, needed, whole, weights=["int8"], budgets=[0.3], batches=[2])[0] == Settings(
        "int8", 0.3, 2
    )
    with pytest.raises(UserError, match="nothing fits into 1.0 GiB: the smallest choice .* needs"):
        fit(plan, needed, 1 << 30)


def test_devices_by_size_and_by_name() -> None:
    assert (
        find_device("8GB").memory_bytes == 8 * 10**9
        and find_device("8 GiB").memory_bytes == 8 << 30
    )
    nano = find_device("jetson-orin-nano")
    assert nano.flavor == "tensorrt" and 6 << 30 < nano.memory_bytes < 8 << 30
    assert find_device("cpu").flavor is None
    with pytest.raises(UserError, match="choose a size such as 8GB, or one of .*jetson-orin-nano"):
        find_device("toaster")


def test_the_commands_do_what_was_planned() -> None:
    lines = commands(SPEC, ORIN, Settings("int4", 0.15, 2), "jetson-orin-nano", Path("bundles/it"))
    assert (
        lines[0]
        == "ssd-export export --model janus-pro-1b --budget 0.15 --dtype fp16 --weights int4"
    )
    assert lines[1] == "# then on Orin, with a copy of bundles/it:"
    assert lines[2] == "ssd-export build-engine --bundle it --target jetson-orin-nano --batch 1:2:2"
    assert lines[3].startswith("ssd-export generate --bundle it --runner trt --batch 2 ")


def test_a_board_builds_in_its_own_memory() -> None:
    """What a board can run it may not be able to build without swap; this machine's memory is no
    matter.
    """
    board = find_device("jetson-orin-nano")
    small, large = (plan(Settings("int4", 0.1, 1), board, model=m) for m in (ONE_B, SEVEN_B))
    assert what_does_not_fit(small, board) == []
    (line,) = what_does_not_fit(large, board)
    build = next(stage for stage in large.stages() if stage.name == BUILD_ON_DEVICE)
    assert line.startswith(f"build-engine runs on {board.name} and needs {gib(build.host_bytes)}")
    assert gib(build.host_bytes - board.memory_bytes) + " of swap" in line


def test_a_build_is_planned_by_what_build_engine_refuses_by(tmp_path: Path) -> None:
    """TensorRT has the weights that engines are given, and its workspace, in the board's memory."""
    path = export_bundle(ExportSpec(model="demo", dtype="fp16", out=tmp_path / "bundle"))
    made = plan(device=find_device("jetson-orin-nano"), model="demo")
    (build,) = (stage for stage in made.stages() if stage.name == BUILD_ON_DEVICE)
    bundle, target = open_bundle(path), read_target("jetson-orin-nano")
    needed = needed_bytes(bundle, target, Flavor("tensorrt", "10.3", None))
    assert build.host_bytes == pytest.approx(needed, abs=1 << 20)
    assert needed_bytes(bundle, target, Flavor("tensorrt-rtx", "1.7", None)) < needed - (1 << 30)


def test_times_are_classes() -> None:
    assert [time_class(seconds) for seconds in (1, 30, 300, 3000, 9000)] == [
        "seconds",
        "under a minute",
        "minutes",
        "tens of minutes",
        "hours",
    ]
