"""The kernels compile ahead of time without a GPU, and what kernels.json says about an image is
so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx_ir as ir
import pytest

from ssd_export.errors import UserError
from ssd_export.kernels.image import (
    KERNELS,
    STEP_KERNELS,
    KernelCode,
    KernelImage,
    Variant,
    attach_kernel,
    find_image,
    read_image,
    read_manifest,
)

SMALL = Variant("float16", 32)


def compiled(folder: Path, targets: tuple[int, ...], dtypes: tuple[str, ...]) -> list[KernelImage]:
    pytest.importorskip("triton", reason="needs Triton: pip install ssd-export[kernels]")
    from ssd_export.kernels.compile import compile_kernels

    return compile_kernels(folder, targets, dtypes, head_dims=(32,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    compiled(folder, (75, 120), ("float16",))
    return folder


def check_image(folder: Path, image: KernelImage) -> None:
    manifest = json.loads((folder / "kernels.json").read_text())
    ptx_of, cubin_of = (read_image(folder, image, kind) for kind in ("ptx", "cubin"))
    for name, kernel in image.kernels.items():
        ptx = ptx_of[name].decode()
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
        assert entry[1] == kernel.name
        sizes = {"int32": ".u32", "float32": ".f32"}
        wanted = [sizes.get(argument["type"], ".u64") for argument in manifest["arguments"][name]]
        assert re.findall(r"\.param (\.\w+)", entry[2]) == wanted
        assert f".version {image.ptx_version // 10}.{image.ptx_version % 10}\n" in ptx
        assert re.search(rf"\.target sm_{image.target}a?\n", ptx)
        assert f".reqntid {32 * image.num_warps}" in ptx
        assert cubin_of[name].startswith(b"\x7fELF") and len(cubin_of[name]) < 100_000, (
            "no line tables, which name paths of this machine"
        )
        assert kernel.shared_bytes <= 48 * 1024
    assert image.max_slots >= 64 + 576


def test_two_targets_compile_and_match_the_manifest(folder: Path) -> None:
    images = read_manifest(folder)
    assert [(image.target, image.variant) for image in images] == [(75, SMALL), (120, SMALL)]
    for image in images:
        check_image(folder, image)


@pytest.mark.slow
def test_every_target_compiles(tmp_path: Path) -> None:
    targets = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
    images = compiled(tmp_path, targets, ("float16",))
    assert [image.target for image in images] == list(targets)
    for image in images:
        check_image(tmp_path, image)


@pytest.mark.slow
def test_every_dtype_compiles(tmp_path: Path) -> None:
    images = compiled(tmp_path, (80,), ("bfloat16", "float32"))
    assert [image.variant.dtype for image in images] == ["bfloat16", "float32"]
    for image in images:
        check_image(tmp_path, image)


def test_arguments_are_the_launcher_s(folder: Path) -> None:
    manifest = json.loads((folder / "kernels.json").read_text())
    names = {
        kernel: [argument["name"] for argument in arguments]
        for kernel, arguments in manifest["arguments"].items()
    }
    assert list(names) == list(manifest["grids"]) == [*KERNELS]
    assert all(of_one[-2:] == ["global_scratch", "profile_scratch"] for of_one in names.values())
    assert names["layer"][:2] == names["part"][:2] == ["query_ptr", "key_ptr"]
    assert names["evict"][-3] == "evict_every[2]" and names["attend"][:2] == names["layer"][:2]
    assert names["write"][:4] == ["key_ptr", "value_ptr", "position_ptr", "counts_ptr"]
    assert names["layer"][-3] == "evict_every[2]" and names["sum"][0] == "cache_positions[0]"


def test_a_cubin_is_for_its_target_and_old_ptx_for_everything_newer(folder: Path) -> None:
    images = read_manifest(folder)
    found = {target: find_image(images, target, SMALL) for target in (75, 80, 90, 120, 121)}
    assert {target: (image.target, kind) for target, (image, kind) in found.items()} == {
        75: (75, "cubin"),
        80: (75, "ptx"),
        90: (75, "ptx"),
        120: (120, "cubin"),
        121: (75, "ptx"),
    }


def test_no_image_names_the_command(folder: Path) -> None:
    with pytest.raises(UserError, match="--targets 75 --dtypes float32 --head-dims 32"):
        find_image(read_manifest(folder), 75, Variant("float32", 32))
    with pytest.raises(UserError, match="no kernel image for sm70"):
        find_image(read_manifest(folder), 70, SMALL)


def test_attached_images_survive_a_file(folder: Path, tmp_path: Path) -> None:
    image = read_manifest(folder)[0]
    given = image.attributes(read_image(folder, image, "cubin"))
    out = ir.Value(name="out")
    nodes = [
        ir.Node("ssd_export", "DecodeAttention", [], outputs=[out]),
        ir.Node("", "Identity", [out]),
    ]
    model = ir.Model(
        ir.Graph([], nodes[1].outputs, nodes=nodes, opset_imports={"": 18, "ssd_export": 1}),
        ir_version=10,
    )
    assert attach_kernel(model, given, "ssd_export", "DecodeAttention") == 1
    ir.save(model, tmp_path / "model.onnx")
    read = {
        name: attribute.value
        for name, attribute in ir.load(tmp_path / "model.onnx").graph[0].attributes.items()
    }
    for name in STEP_KERNELS:
        read[f"kernel_{name}_image"] = read[f"kernel_{name}_image"].numpy().tobytes()
    assert read == given


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "kernels.json").unlink(), "no kernel images in"),
        (lambda folder: (folder / "kernels.json").write_text("{"), "damaged"),
        (
            lambda folder: (folder / "kernels.json").write_text('{"schema": 99, "images": []}'),
            "has schema 99",
        ),
    ],
)
def test_a_damaged_folder_says_what_to_do(tmp_path: Path, damage: object, message: str) -> None:
    (tmp_path / "kernels.json").write_text('{"schema": 5, "images": []}')
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_a_changed_image_is_refused(tmp_path: Path) -> None:
    code = KernelCode("k", 0, "k.ptx", "0" * 64, "k.cubin", "0" * 64)
    image = KernelImage(75, SMALL, 4, 32, 1024, 32, 80, dict.fromkeys(KERNELS, code))
    with pytest.raises(UserError, match="is missing"):
        read_image(tmp_path, image, "ptx")
    (tmp_path / "k.ptx").write_text("another")
    with pytest.raises(UserError, match="is not the one of"):
        read_image(tmp_path, image, "ptx")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"targets": (70,)}, "no kernel target 70; choose from 75, 80"),
        ({"dtypes": ("int8",)}, "no kernel dtype 'int8'"),
        ({"head_dims": (512,)}, "must be in 1..256"),
        ({"max_slots": 0}, "max_slots=0"),
    ],
)
def test_what_cannot_be_compiled_is_named(tmp_path: Path, asked: dict, message: str) -> None:
    from ssd_export.kernels.compile import compile_kernels

    with pytest.raises(UserError, match=message):
        compile_kernels(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
