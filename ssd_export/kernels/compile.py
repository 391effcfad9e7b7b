"""Compiles the attention kernels of a layer ahead of time, without a GPU: PTX and cubin for each
target, dtype and head_dim.

    python -m ssd_export.kernels.compile --targets 75,87,120 --out kernels/

One image serves every policy, number of slots up to --max-slots and number of query heads. Beside
the images stands kernels.json (read by kernels/image.py), which says how to launch them.

Triton makes code for one exact architecture from compute capability 9.0 on ("sm_90a"), so each of
those is a separate target; PTX of an older target also runs on everything newer. PTX is lowered
to the oldest version that knows its target, and cubins come from the oldest assembler that does,
for drivers older than Triton's tools.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssd_export.dtypes import DTYPES, MODEL_DTYPES
from ssd_export.errors import UserError
from ssd_export.kernels.argument_types import ArgumentType, argument_types
from ssd_export.kernels.image import (
    ATTEND,
    EVICT,
    KERNELS,
    LAYER,
    MANIFEST_FILE,
    PART,
    SCHEMA,
    SUM,
    WRITE,
    KernelCode,
    KernelImage,
    Variant,
)

PTX_VERSIONS = {
    75: 80,
    80: 80,
    86: 80,
    87: 80,
    89: 80,
    90: 80,
    100: 86,
    103: 88,
    110: 90,
    120: 87,
    121: 88,
}
TARGETS = tuple(PTX_VERSIONS)
NEEDS_NEW_ASSEMBLER = (110,)  # CUDA 13 gave this architecture its number
KERNEL_DTYPES = tuple(row.name for row in MODEL_DTYPES.values())
HEAD_DIMS = (32, 128)  # the demo model; Janus-Pro 1B and 7B
MAX_SLOTS = 1024
GRIDS = {
    LAYER: ["rows * num_heads"],
    PART: ["rows * num_heads", "num_splits"],
    SUM: ["rows * num_heads"],
    EVICT: ["rows * num_heads"],
    ATTEND: ["rows * num_heads", "query_group_size * num_places"],
    WRITE: ["rows * num_heads"],
}
PARTS_OF_A_TENSOR = ("query_ptr", "key_ptr", "value_ptr")  # which begin where its heads happen to
SCRATCH = ({"name": "global_scratch", "type": "null"}, {"name": "profile_scratch", "type": "null"})


def compile_kernels(
    out: Path,
    targets: Iterable[int] = TARGETS,
    dtypes: Iterable[str] = KERNEL_DTYPES,
    head_dims: Iterable[int] = HEAD_DIMS,
    max_slots: int = MAX_SLOTS,
) -> list[KernelImage]:
    """Writes the images and kernels.json into the folder out and returns what is in it.

    Raises: UserError for an unknown target or dtype, or where Triton is not installed.
    """
    targets, dtypes, head_dims = tuple(targets), tuple(dtypes), tuple(head_dims)
    _check_asked(targets, dtypes, head_dims, max_slots)
    triton = _triton()
    out.mkdir(parents=True, exist_ok=True)
    images = [
        compile_image(out, target, Variant(dtype, head_dim), max_slots)
        for target in targets
        for dtype in dtypes
        for head_dim in head_dims
    ]
    manifest = {
        "schema": SCHEMA,
        "triton": triton.__version__,
        "grids": GRIDS,
        "arguments": {name: kernel_arguments(name) for name in KERNELS},
        "images": [asdict(image) for image in images],
    }
    (out / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
    return images


def compile_image(
    out: Path, target: int, variant: Variant, max_slots: int = MAX_SLOTS
) -> KernelImage:
    """Compiles the kernels of one image into the folder out."""
    from ssd_export.kernels.constants import MAX_SPLITS, NUM_WARPS

    attending = kernel_source(LAYER, variant, max_slots)[1]
    return KernelImage(
        target=target,
        variant=variant,
        num_warps=NUM_WARPS,
        block_slots=attending["BLOCK_SLOTS"],
        max_slots=attending["SLOT_CAPACITY"],
        max_splits=MAX_SPLITS,
        ptx_version=PTX_VERSIONS[target],
        kernels={name: _compiled(out, name, target, variant, max_slots) for name in KERNELS},
    )


def _compiled(out: Path, name: str, target: int, variant: Variant, max_slots: int) -> KernelCode:
    kernel, compiled_in = kernel_source(name, variant, max_slots)
    types = argument_types(kernel, compiled_in)
    compiled = compile_kernel(kernel, types, compiled_in, target, variant)
    metadata, stem = compiled.metadata, f"{name}-sm{target}-{variant.dtype}-d{variant.head_dim}"
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError("the kernel wants scratch memory, which its launchers do not give")
    files: dict[str, str] = {}
    for kind, data in (("ptx", compiled.asm["ptx"].encode()), ("cubin", compiled.asm["cubin"])):
        (out / f"{stem}.{kind}").write_bytes(data)
        files |= {kind: f"{stem}.{kind}", f"{kind}_sha256": hashlib.sha256(data).hexdigest()}
    return KernelCode(metadata.name, metadata.shared, **files)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, ArgumentType],
    compiled_in: Mapping[str, int],
    target: int,
    variant: Variant,
) -> Any:
    """Triton's result for one kernel.

    Args: types: of its arguments, in order, as kernels.json has them; a tuple's are a tuple.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget

    from ssd_export.kernels.constants import NUM_WARPS

    signature: dict[str, Any] = {
        name: _triton_type(kind, variant)
        if isinstance(kind, str)
        else tuple(_triton_type(one, variant) for one in kind)
        for name, kind in types.items()
    }
    aligned = {
        place: [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        for place, one in _places(index, kind)
        if one[0] == "*" and name not in PARTS_OF_A_TENSOR
    }
    signature |= dict.fromkeys(compiled_in, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature, dict(compiled_in), aligned)
    options = {
        "num_warps": NUM_WARPS,
        "ptx_version": PTX_VERSIONS[target],
        "enable_fp_fusion": True,
    }
    with _oldest_tools(target):
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _places(index: int, kind: ArgumentType) -> list[tuple[tuple[int, ...], str]]:
    """Path and type of an argument, or of each of a tuple's."""
    if isinstance(kind, str):
        return [((index,), kind)]
    return [((index, place), one) for place, one in enumerate(kind)]


@contextmanager
def _oldest_tools(target: int) -> Iterator[None]:
    """Assembles by the older of Triton's two assemblers where it knows the target; no source lines,
    no old cache.
    """
    from triton import knobs

    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        knobs.cache.scope(),
        tempfile.TemporaryDirectory() as cache,
    ):
        if target not in NEEDS_NEW_ASSEMBLER:
            knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
        knobs.compilation.disable_line_info = True
        knobs.cache.dir = cache
        yield


def kernel_source(name: str, variant: Variant, max_slots: int) -> tuple[Any, dict[str, int]]:
    """One of KERNELS and what is compiled into it."""
    from ssd_export.kernels import constants
    from ssd_export.kernels.layer_attention import decode_layer_kernel
    from ssd_export.kernels.split_attention import attend_split_kernel, combine_splits_kernel
    from ssd_export.kernels.window_attention import (
        attend_window_kernel,
        evict_window_kernel,
        write_window_kernel,
    )

    num_bytes = DTYPES[variant.dtype].num_bytes
    attending = constants.constants(variant.head_dim, max_slots, num_bytes)
    if name == SUM:
        return combine_splits_kernel, constants.combining(attending)
    kernel = {
        LAYER: decode_layer_kernel,
        PART: attend_split_kernel,
        EVICT: evict_window_kernel,
        ATTEND: attend_window_kernel,
        WRITE: write_window_kernel,
    }[name]
    return kernel, {part: attending[part] for part in kernel.arg_names if part in attending}


def kernel_arguments(name: str) -> list[dict[str, str]]:
    """Name and type of every argument of a launch of one of KERNELS, in order; those of head groups
    one by one.
    """
    kernel, compiled_in = kernel_source(name, Variant("float16", 128), MAX_SLOTS)
    listed = []
    for argument, kind in argument_types(kernel, compiled_in).items():
        if isinstance(kind, str):
            listed.append({"name": argument, "type": kind})
            continue
        listed += [{"name": f"{argument}[{place}]", "type": t} for place, t in enumerate(kind)]
    return [*listed, *SCRATCH]


def _triton_type(kind: str, variant: Variant) -> str:
    short = {row.name: row.short for row in MODEL_DTYPES.values()}
    short |= {"int32": "i32", "T": short[variant.dtype]}
    return "*" + short[kind[1:]] if kind[0] == "*" else short[kind]


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise UserError(
            "compiling the kernel needs Triton: pip install ssd-export[kernels]"
        ) from error
    if triton.knobs.runtime.interpret:
        raise UserError(
            "TRITON_INTERPRET is set, which interprets kernels instead of compiling them; unset it"
        )
    return triton


def _check_asked(
    targets: Sequence[int], dtypes: Sequence[str], head_dims: Sequence[int], max_slots: int
) -> None:
    for target in targets:
        if target not in PTX_VERSIONS:
            raise UserError(
                f"no kernel target {target}; choose from {', '.join(map(str, TARGETS))}"
            )
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            raise UserError(f"no kernel dtype {dtype!r}; choose from {', '.join(KERNEL_DTYPES)}")
    if (
        min(head_dims, default=1) < 1
        or max(head_dims, default=1) > 256
        or not 1 <= max_slots <= 8192
    ):
        raise UserError(
            f"head_dims {list(head_dims)} must be in 1..256 and max_slots={max_slots} in 1..8192"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the kernels for the targets asked for."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in text.split(","))

    parser = argparse.ArgumentParser(
        prog="python -m ssd_export.kernels.compile", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for images and kernels.json"
    )
    parser.add_argument(
        "--targets",
        type=numbers,
        default=TARGETS,
        metavar="SM,...",
        help=f"compute capabilities times ten; all of them: {','.join(map(str, TARGETS))}",
    )
    parser.add_argument(
        "--dtypes",
        type=lambda text: tuple(text.split(",")),
        default=KERNEL_DTYPES,
        metavar="DTYPE,...",
    )
    parser.add_argument("--head-dims", type=numbers, default=HEAD_DIMS, metavar="D,...")
    parser.add_argument(
        "--max-slots", type=int, default=MAX_SLOTS, metavar="S", help="of the largest cache"
    )
    asked = parser.parse_args(arguments)
    try:
        images = compile_kernels(
            asked.out, asked.targets, asked.dtypes, asked.head_dims, asked.max_slots
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(
        f"{len(images)} kernel images for {len(asked.targets)} targets in"
        f" {asked.out / MANIFEST_FILE}"
    )


if __name__ == "__main__":
    main()
