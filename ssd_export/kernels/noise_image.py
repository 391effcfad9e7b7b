"""The noise kernel, compiled: PTX for compute capability 7.5, which every newer GPU's driver
compiles to the same arithmetic (each operation names its rounding).

    python -m ssd_export.kernels.noise_image        writes gumbel_noise.ptx again, with Triton

A board reads the file and needs no Triton. A launch takes ARGUMENTS, then two null pointers, on a
grid of (steps x images, noise_programs(codebook size)) programs of 32 x NUM_WARPS threads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssd_export.noise import WORD, WORDS_PER_COUNTER, ImageSeed

PTX_FILE = Path(__file__).parent / "gumbel_noise.ptx"
ENTRY = "gumbel_noise_kernel"
TARGET, PTX_VERSION = 75, 80
BLOCK = 256  # counters of a program, four codes each
NUM_WARPS = 4
ARGUMENTS = {
    "noise_ptr": "*float32",
    "images_ptr": "*int32",
    "first_step": "int32",
    "num_images": "int32",
    "codebook_size": "int32",
}


def noise_programs(codebook_size: int) -> int:
    """Programs that write one step of one image."""
    return -(-codebook_size // (WORDS_PER_COUNTER * BLOCK))


def image_words(images: Sequence[ImageSeed]) -> np.ndarray:
    """int32 [images, 3]: the bits of the two words of each seed, and of the image's number."""
    words = [(seed & WORD, seed >> 32, image) for seed, image in images]
    return np.array(words, np.uint32).view(np.int32)


def compile_noise_kernel() -> str:
    """PTX of the kernel, without the lines that name source files."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ssd_export.kernels.gumbel_noise import gumbel_noise_kernel

    short = {"*float32": "*fp32", "*int32": "*i32", "int32": "i32"}
    signature = {name: short[kind] for name, kind in ARGUMENTS.items()} | {"BLOCK": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(2)}
    source = triton.compiler.ASTSource(gumbel_noise_kernel, signature, {"BLOCK": BLOCK}, aligned)
    options = {"num_warps": NUM_WARPS, "ptx_version": PTX_VERSION, "enable_fp_fusion": False}
    with triton.knobs.compilation.scope(), triton.knobs.cache.scope():
        triton.knobs.compilation.disable_line_info = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", TARGET, 32), options=options)
    if compiled.metadata.shared or compiled.metadata.global_scratch_size:
        raise RuntimeError("the kernel wants memory that its launch does not give")
    return re.sub(r"^//.*\n", "", compiled.asm["ptx"], flags=re.MULTILINE).strip() + "\n"


if __name__ == "__main__":
    PTX_FILE.write_text(compile_noise_kernel(), encoding="ascii")
