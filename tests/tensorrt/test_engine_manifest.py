"""engine.json against where an engine is about to be loaded: every difference is one line with the
command that mends it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssd_export.errors import UserError
from ssd_export.tensorrt.engine_manifest import (
    SCHEMA,
    Here,
    check_batch,
    check_provenance,
    folder_name,
)

HERE = Here("tensorrt-rtx", "1.7.1.116", 89, "linux", "x86_64", "abc", "bundles/demo")
ENGINE = {
    "schema": SCHEMA,
    "flavour": "tensorrt-rtx",
    "version": "1.7.1.116",
    "compute_capabilities": [86, 89, 120],
    "os": "linux",
    "arch": "x86_64",
    "bundle_hash": "abc",
    "batch": [1, 4, 8],
}
REBUILD = "ssd-export build-engine --bundle bundles/demo"


def test_an_engine_of_this_place_passes() -> None:
    assert check_provenance(ENGINE, HERE) is None


@pytest.mark.parametrize(
    "here, reason",
    [
        (
            replace(HERE, compute_capability=87),
            "compute capability 8.6, 8.9, 12.0 and this one has 8.7",
        ),
        (
            replace(HERE, version="1.8.0.1"),
            "tensorrt-rtx 1.7.1.116 and tensorrt-rtx 1.8.0.1 is here",
        ),
        (
            replace(HERE, flavour="tensorrt", version="10.3.0"),
            "tensorrt-rtx 1.7.1.116 and tensorrt 10.3.0 is here",
        ),
        (replace(HERE, bundle_hash="def"), "built from another bundle than bundles/demo"),
        (replace(HERE, arch="aarch64"), "for linux x86_64 and this is linux aarch64"),
        (replace(HERE, os="windows"), "for linux x86_64 and this is windows x86_64"),
    ],
)
def test_every_other_place_is_refused_with_the_rebuild_command(here: Here, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        check_provenance(ENGINE, here)
    assert reason in str(refused.value) and str(refused.value).endswith(REBUILD)
    assert "\n" not in str(refused.value)


def test_a_later_schema_is_refused() -> None:
    with pytest.raises(UserError, match="schema 3 and this version reads 2"):
        check_provenance(ENGINE | {"schema": SCHEMA + 1}, HERE)


@pytest.mark.parametrize("num_images, wider", [(9, "1:4:9"), (0, "0:4:8")])
def test_a_batch_outside_the_profile_is_refused(num_images: int, wider: str) -> None:
    with pytest.raises(UserError) as refused:
        check_batch(ENGINE, num_images, "bundles/demo")
    assert str(refused.value).endswith(f"{REBUILD} --batch {wider}")
    check_batch(ENGINE, 8, "bundles/demo")


def test_the_folder_says_what_the_engines_are_for() -> None:
    assert folder_name("tensorrt", "10.3.0", (87,)).startswith("engines/tensorrt10.3.0-sm87-")
    assert "-sm86+89+120-" in folder_name("tensorrt-rtx", "1.7.1.116", (86, 89, 120))
