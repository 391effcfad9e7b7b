"""Recipes, the choice of target and flavor, and batches."""

from __future__ import annotations

import pytest

from ssd_export.errors import UserError
from ssd_export.tensorrt import target as targets
from ssd_export.tensorrt.target import (
    Batch,
    choose_flavor,
    choose_target,
    read_target,
    target_names,
)


def test_every_recipe_reads() -> None:
    assert set(target_names()) >= {
        "rtx",
        "ampere",
        "ada",
        "hopper",
        "blackwell",
        "jetson-orin",
        "jetson-thor",
    }
    for name in set(target_names()) - {"cpu"}:
        target = read_target(name)
        assert target.title and target.compute_capabilities and target.workspace_mib > 0
        assert set(target.flavors) <= {"tensorrt", "tensorrt-rtx"}


def test_a_cpu_needs_no_engine() -> None:
    with pytest.raises(UserError, match="--runner ort"):
        read_target("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "../rtx", "RTX"])
def test_an_unknown_target_is_refused_with_the_known(name: str) -> None:
    with pytest.raises(UserError, match="choose auto or one of .*jetson-orin"):
        read_target(name)


@pytest.mark.parametrize(
    "capability, name",
    [
        (87, "jetson-orin"),
        (110, "jetson-thor"),
        (90, "hopper"),
        (80, "a100"),
        (86, "ampere"),
        (89, "ada"),
        (120, "blackwell"),
    ],
)
def test_auto_is_the_gpu_here(capability: int, name: str) -> None:
    target = choose_target("auto", capability)
    assert (target.name, target.compute_capabilities) == (name, (capability,))


def test_every_gpu_of_a_recipe_is_one_that_auto_chooses() -> None:
    """Recipes for the memory of a machine alone repeat the GPU of one that auto chooses."""
    for name in set(target_names()) - {"cpu"}:
        for capability in read_target(name).compute_capabilities:
            chosen = choose_target("auto", capability)
            assert set(chosen.flavors) <= {"tensorrt", *read_target(name).flavors}


def test_tensorrt_rtx_is_asked_only_for_what_it_supports() -> None:
    """7.5, 8.6, 8.9, 12.0 and 12.1 in 1.7; its builder takes 8.0 all the same. Datacenter Blackwell
    is in a recipe for both; the builder's own list leaves it out."""
    targets = [read_target(name) for name in set(target_names()) - {"cpu"}]
    for_rtx = [target for target in targets if "tensorrt-rtx" in target.flavors]
    assert for_rtx
    for target in for_rtx:
        assert set(target.compute_capabilities) <= {75, 86, 89, 120, 121, 100, 103}


def test_auto_without_a_gpu_is_rtx_and_an_unknown_gpu_is_refused() -> None:
    assert choose_target("auto", None).name == "rtx"
    with pytest.raises(UserError, match="compute capability 5.2"):
        choose_target("auto", 52)


def test_a_missing_module_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"pip install ssd-export\[rtx\]"):
        choose_flavor("auto", read_target("rtx"))
    with pytest.raises(UserError, match="JetPack brings it"):
        choose_flavor("auto", read_target("jetson-orin"))
    with pytest.raises(UserError, match="does not build for jetson-orin; use --flavor tensorrt"):
        choose_flavor("tensorrt-rtx", read_target("jetson-orin"))


def test_a_batch_is_three_numbers_in_order() -> None:
    assert Batch.parse("1:4:8") == Batch(1, 4, 8) and str(Batch(1, 4, 8)) == "1:4:8"


@pytest.mark.parametrize(
    "text", ["", "4", "1:2", "0:1:2", "4:2:8", "1:9:8", "a:b:c", "1:2:3:4", "-1:2:3"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="--batch 1:4:8"):
        Batch.parse(text)
