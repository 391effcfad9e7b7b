"""Stand-ins for compiled kernel images: valid PTX that returns at once, enough to build an engine,
not to run it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from ssd_export.kernels.image import MANIFEST_FILE, SCHEMA, KernelImage, Variant

PTX = (
    ".version 8.0\n.target sm_{}\n.address_size 64\n.visible .entry decode_attention_kernel() {{"
    " ret; }}\n"
)


def write_kernels(
    folder: Path, targets: tuple[int, ...], head_dim: int, dtype: str = "float16"
) -> Path:
    """A folder of images for these targets, as ssd_export.kernels.compile writes it; returns the
    folder.
    """
    images = []
    for target in targets:
        files = {"ptx": PTX.format(target).encode(), "cubin": f"cubin of {target}".encode()}
        for kind, data in files.items():
            (folder / f"{target}.{kind}").write_bytes(data)
        images.append(
            KernelImage(
                target=target,
                variant=Variant(dtype, head_dim),
                kernel_name="decode_attention_kernel",
                num_warps=4,
                shared_bytes=512,
                block_slots=64,
                max_slots=1024,
                ptx_version=80,
                ptx=f"{target}.ptx",
                ptx_sha256=hashlib.sha256(files["ptx"]).hexdigest(),
                cubin=f"{target}.cubin",
                cubin_sha256=hashlib.sha256(files["cubin"]).hexdigest(),
            )
        )
    manifest = {"schema": SCHEMA, "arguments": [], "images": [asdict(image) for image in images]}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder
