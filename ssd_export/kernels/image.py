"""Kernel images that were compiled ahead of time: reads kernels.json, picks one, hands it to the
plugin's nodes.

Needs neither Triton nor torch nor a GPU. An image is the kernels of a layer for one target, dtype
and head_dim. kernels.json (schema 5) holds `arguments` (of each kernel, name and type in the
order of a launch: "*T" points to the dtype of the cache, "null" is a null pointer), `grids` (number
of programs of each; 32 x num_warps threads each) and `images`, each a KernelImage; file names are
relative to its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_export.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

MANIFEST_FILE = "kernels.json"
SCHEMA = 5
LAYER, PART, SUM = "layer", "part", "sum"
EVICT, ATTEND, WRITE = "evict", "attend", "write"
# A launch for a layer; where its slots are split, one for the parts and one that adds them up.
STEP_KERNELS = (LAYER, PART, SUM)
# Of a pass over several tokens: before it, over all of them, and for those that count.
WINDOW_KERNELS, SETTLE_KERNELS = (EVICT, ATTEND), (WRITE,)
KERNELS = (*STEP_KERNELS, *WINDOW_KERNELS, *SETTLE_KERNELS)
NODE_KERNELS = {  # by the operator of a node (export/plugin_flavor.py)
    "DecodeAttention": STEP_KERNELS,
    "WindowAttention": WINDOW_KERNELS,
    "WindowSettle": SETTLE_KERNELS,
}
FIRST_EXACT_TARGET = 90  # from here on PTX is for one architecture alone


@dataclass(frozen=True)
class Variant:
    """Constants that a kernel image is compiled for, beside the target."""

    dtype: str
    head_dim: int


@dataclass(frozen=True)
class KernelCode:
    """One compiled kernel: its entry point, its shared memory and its files."""

    name: str
    shared_bytes: int
    ptx: str
    ptx_sha256: str
    cubin: str
    cubin_sha256: str


@dataclass(frozen=True)
class KernelImage:
    """The compiled kernels of a layer and how to launch them. target: compute capability times ten;
    ptx_version: 80 is 8.0; kernels: by KERNELS.
    """

    target: int
    variant: Variant
    num_warps: int
    block_slots: int
    max_slots: int
    max_splits: int
    ptx_version: int
    kernels: dict[str, KernelCode]

    def attributes(
        self, data: Mapping[str, bytes], op_type: str = "DecodeAttention"
    ) -> dict[str, int | str | bytes]:
        """Attributes of a node that tell the plugin its kernels; data: the bytes of the cubin or
        the PTX of each; op_type: the node's operator.
        """
        kernels = NODE_KERNELS[op_type]
        return {
            "kernel_dtype": self.variant.dtype,
            "kernel_head_dim": self.variant.head_dim,
            "kernel_max_slots": self.max_slots,
            "kernel_block_slots": self.block_slots,
            "kernel_max_splits": self.max_splits,
            "kernel_num_warps": self.num_warps,
            **{f"kernel_{name}_image": data[name] for name in kernels},
            **{f"kernel_{name}_name": self.kernels[name].name for name in kernels},
            **{f"kernel_{name}_shared_bytes": self.kernels[name].shared_bytes for name in kernels},
        }


def read_manifest(folder: Path) -> list[KernelImage]:
    """The images in a folder. Raises: UserError where there is no manifest or it is of another
    version.
    """
    path, again = folder / MANIFEST_FILE, "run python -m ssd_export.kernels.compile --out DIR again"
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] != SCHEMA:
            raise UserError(
                f"{path} has schema {manifest['schema']}, this version reads {SCHEMA}; {again}"
            )
        return [_image(image) for image in manifest["images"]]
    except FileNotFoundError as error:
        raise UserError(f"no kernel images in {folder}; {again}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {again}") from error


def _image(read: dict[str, Any]) -> KernelImage:
    kernels = {name: KernelCode(**read["kernels"][name]) for name in KERNELS}
    return KernelImage(**{**read, "variant": Variant(**read["variant"]), "kernels": kernels})


def find_image(images: list[KernelImage], target: int, variant: Variant) -> tuple[KernelImage, str]:
    """The image for a GPU and its kind: the cubin of that very target, else the newest PTX that
    runs there.

    Raises: UserError, naming what is there, where none runs on the target.
    """
    fitting = [image for image in images if image.variant == variant]
    for image in fitting:
        if image.target == target:
            return image, "cubin"
    older = [image for image in fitting if image.target < min(target, FIRST_EXACT_TARGET)]
    if older:
        return max(older, key=lambda image: image.target), "ptx"
    there = ", ".join(
        f"sm{image.target} {image.variant.dtype} head_dim {image.variant.head_dim}"
        for image in images
    )
    raise UserError(
        f"no kernel image for sm{target} {variant.dtype} head_dim {variant.head_dim} (there: "
        f"{there or 'none'}); run python -m ssd_export.kernels.compile --targets {target} --dtypes "
        f"{variant.dtype} --head-dims {variant.head_dim} --out DIR"
    )


def read_image(folder: Path, image: KernelImage, kind: str) -> dict[str, bytes]:
    """The bytes of each kernel's "cubin" or "ptx". Raises: UserError where they are not those of
    the manifest.
    """
    return {name: _read_kernel(folder, image.kernels[name], kind) for name in KERNELS}


def _read_kernel(folder: Path, kernel: KernelCode, kind: str) -> bytes:
    path = folder / getattr(kernel, kind)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"kernel image {path} is missing; compile the kernels again") from error
    if hashlib.sha256(data).hexdigest() != getattr(kernel, f"{kind}_sha256"):
        raise UserError(
            f"kernel image {path} is not the one of {MANIFEST_FILE}; compile the kernels again"
        )
    return data


def attach_kernel(
    model: ir.Model, attributes: Mapping[str, int | str | bytes], domain: str, op_type: str
) -> int:
    """Gives every node domain::op_type of a model the attributes of a kernel image; returns how
    many there are.
    """
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (domain, op_type)]
    for node in nodes:
        node.attributes.update(
            {name: _onnx_attribute(name, value) for name, value in attributes.items()}
        )
    return len(nodes)


def _onnx_attribute(name: str, value: int | str | bytes) -> ir.Attr:
    """Bytes as an int8 tensor: an ONNX string is UTF-8, and TensorRT's parser mistypes uint8."""
    import numpy as np
    import onnx_ir as ir

    if isinstance(value, bytes):
        return ir.AttrTensor(name, ir.tensor(np.frombuffer(value, np.int8)))
    return ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrString(name, value)
