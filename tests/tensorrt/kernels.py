"""Stand-ins for compiled kernel images: valid PTX that returns at once, enough to build an engine,
not to run it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from ssd_export.kernels.image import (
    KERNELS,
    MANIFEST_FILE,
    SCHEMA,
    KernelCode,
    KernelImage,
    Variant,
)

PTX = ".version 8.0\n.target sm_{}\n.address_size 64\n.visible .entry {}() {{ ret; }}\n"


def write_kernels(
    folder: Path, targets: tuple[int, ...], head_dim: int, dtype: str = "float16"
) -> Path:
    """A folder of images for these targets, as ssd_export.kernels.compile writes it; returns the
    folder.
    """
    images = [
        KernelImage(
            target=target,
            variant=Variant(dtype, head_dim),
            num_warps=4,
            block_slots=64,
            max_slots=1024,
            max_splits=32,
            ptx_version=80,
            kernels={name: _write_kernel(folder, name, target) for name in KERNELS},
        )
        for target in targets
    ]
    manifest = {"schema": SCHEMA, "arguments": {}, "images": [asdict(image) for image in images]}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


def _write_kernel(folder: Path, name: str, target: int) -> KernelCode:
    entry = f"{name}_kernel"
    files = {"ptx": PTX.format(target, entry).encode(), "cubin": f"cubin of {target}".encode()}
    written: dict[str, str] = {}
    for kind, data in files.items():
        (folder / f"{name}-{target}.{kind}").write_bytes(data)
        written |= {
            kind: f"{name}-{target}.{kind}",
            f"{kind}_sha256": hashlib.sha256(data).hexdigest(),
        }
    return KernelCode(entry, 512, **written)
