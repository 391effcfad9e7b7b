"""engine.json against where an engine is about to be loaded: every difference is one line with the
command that mends it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_export.bundle import Bundle, FileEntry, open_bundle
from ssd_export.bundle.manifest import Manifest
from ssd_export.errors import UserError
from ssd_export.plan.sizes import StoredWeight
from ssd_export.tensorrt.engine_manifest import (
    FILE,
    SCHEMA,
    EngineEntry,
    EngineManifest,
    Flags,
    Here,
    check_batch,
    check_provenance,
    folder_name,
    read_engines,
)
from ssd_export.tensorrt.profiles import Profile
from ssd_export.typed_json import to_json
from tests.bundle.mutations import REMOVED, WRONG_VALUES, mutated, places
from tests.bundle.small_bundles import small_config, write_small_bundle

HERE = Here("tensorrt-rtx", "1.7.1.116", 89, "linux", "x86_64", "abc", "bundles/demo")
ENGINE = EngineManifest(
    schema=SCHEMA,
    tool_version="0.1.0",
    target="ada",
    flavor="tensorrt-rtx",
    version="1.7.1.116",
    compute_capabilities=(86, 89, 120),
    os="linux",
    arch="x86_64",
    bundle_hash="abc",
    batch=(1, 4, 8),
    prompt_slots=64,
    workspace_mib=64,
    flags=Flags(True, False, False, False),
    form="kv-update",
    plugin=None,
    weights_file="onnx/weights.safetensors",
    graphs={
        "decode_step": EngineEntry(
            engine="decode_step.engine",
            bytes=3,
            sha256="1" * 64,
            onnx="onnx/decode_step.onnx",
            onnx_sha256="2" * 64,
            layers={"gemm": 3},
            profiles=(Profile((1, 4, 8), (64, 64, 64)),),
            aliases={"present.0.0.key": "past_key_values.0.0.key"},
            weights={"layers.0.qkv": StoredWeight("float16", (32, 64), 64, 4096)},
            activation_bytes=None,
            seconds=1.5,
        )
    },
    warnings=("decode_step: something",),
)
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
            replace(HERE, flavor="tensorrt", version="10.3.0"),
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


def added(tmp_path: Path, text: str) -> Bundle:
    bundle = open_bundle(write_small_bundle(tmp_path / "b", small_config()))
    return bundle.add_files({f"engines/rtx/{FILE}": text.encode()})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_engines(added(tmp_path, to_json(ENGINE))) == {"engines/rtx": ENGINE}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": SCHEMA + 1}, f"has schema {SCHEMA + 1} and this version reads {SCHEMA}; build"),
        ({"batch": (4, 2, 1)}, r"batch is \[4, 2, 1\], expected three rising numbers from 1 to"),
        ({"batch": (1, 1, 10**12)}, "batch is .* from 1 to 65536"),
        ({"prompt_slots": 0}, "prompt_slots is 0, expected 1 to"),
        (
            {"graphs": {"a": replace(ENGINE.graphs["decode_step"], profiles=())}},
            "graphs.a.profiles",
        ),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_engines(added(tmp_path, to_json(replace(ENGINE, **change))))


@settings(max_examples=300)
@given(
    place=st.sampled_from(places(json.loads(to_json(ENGINE)))),
    wrong=st.sampled_from((REMOVED, *WRONG_VALUES)),
)
def test_one_wrong_value_anywhere(place: tuple, wrong: str) -> None:
    class Stub(Bundle):
        """A bundle of one file."""

        def read(self, name: str) -> bytes:
            return mutated(to_json(ENGINE), place, wrong)

    entry = FileEntry(0, "")
    manifest = Manifest(2, {f"engines/rtx/{FILE}": entry})
    stub = Stub(Path("b"), small_config(), manifest, "", Path("b"), {})
    try:
        read_engines(stub)
    except UserError as error:
        assert str(error).startswith("b/engines/rtx/engine.json") and str(error).isprintable()
        assert str(error).endswith("build it here: ssd-export build-engine --bundle b")


@pytest.mark.parametrize("num_images, wider", [(9, "1:4:9"), (0, "0:4:8")])
def test_a_batch_outside_the_profile_is_refused(num_images: int, wider: str) -> None:
    with pytest.raises(UserError) as refused:
        check_batch(ENGINE, num_images, "bundles/demo")
    assert str(refused.value).endswith(f"{REBUILD} --batch {wider}")
    check_batch(ENGINE, 8, "bundles/demo")


def test_the_folder_says_what_the_engines_are_for() -> None:
    assert folder_name("tensorrt", "10.3.0", (87,)).startswith("engines/tensorrt10.3.0-sm87-")
    assert "-sm86+89+120-" in folder_name("tensorrt-rtx", "1.7.1.116", (86, 89, 120))
