"""The noise of noise.py as a Triton kernel: the same bits, written where a GPU reads them.

One program writes the codes of BLOCK counters, four each, of one step of one image. Compiled
without fusion of products and sums, and with the division that rounds once: that is what makes the
bits equal.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssd_export import noise
from ssd_export.kernels.noise_image import BLOCK, NUM_WARPS, noise_programs

ROUNDS = tl.constexpr(noise.PHILOX_ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(number) for number in noise.PHILOX_MULTIPLIERS)
WEYL_0, WEYL_1 = (tl.constexpr(number) for number in noise.PHILOX_WEYL)
SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
MANTISSA_BITS = tl.constexpr(noise.MANTISSA_BITS)
P0, P1, P2 = (tl.constexpr(number) for number in (noise.P0, noise.P1, noise.P2))
UNIT = tl.constexpr(noise.UNIT)
MINUS_LOG_2 = tl.constexpr(noise.MINUS_LOG_2)


def fill_noise(out: Tensor, images: Tensor, steps: range) -> None:
    """Writes g of these steps to the first rows of out, float32 [any, images, codebook].

    Args: images: noise_image.image_words() on the device of out.
    """
    _, num_images, codebook_size = out.shape
    grid = (len(steps) * num_images, noise_programs(codebook_size))
    gumbel_noise_kernel[grid](
        out,
        images,
        steps.start,
        num_images,
        codebook_size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["first_step", "num_images", "codebook_size"])
def gumbel_noise_kernel(
    noise_ptr, images_ptr, first_step, num_images, codebook_size, BLOCK: tl.constexpr
):
    """Noise of BLOCK counters of a grid row, in the order of operations of noise.py."""
    # noise: float32 [steps, images, codebook], contiguous; images: int32 [images, 3]
    step, image = tl.program_id(0) // num_images, tl.program_id(0) % num_images
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed_low = tl.load(images_ptr + 3 * image).to(tl.uint32, bitcast=True)
    seed_high = tl.load(images_ptr + 3 * image + 1).to(tl.uint32, bitcast=True)
    number = tl.load(images_ptr + 3 * image + 2).to(tl.uint32, bitcast=True)
    zero = tl.zeros([BLOCK], tl.uint32)
    step_words = zero + (first_step + step).to(tl.uint32)
    words = _philox(
        step_words, zero + number, counter.to(tl.uint32, bitcast=True), zero, seed_low, seed_high
    )
    row_ptr = noise_ptr + tl.program_id(0).to(tl.int64) * codebook_size
    for place in tl.static_range(4):
        code = 4 * counter + place
        uniform = ((words[place] >> 8) | 1).to(tl.int32, bitcast=True).to(tl.float32) * UNIT
        gumbel = _negative_log(_negative_log(uniform))
        tl.store(row_ptr + code, gumbel, mask=code < codebook_size)


@triton.jit
def _philox(c0, c1, c2, c3, key_0, key_1):
    """The four output words of counters of uint32."""
    for _ in tl.static_range(ROUNDS):
        low_0, high_0 = c0 * MULTIPLIER_0, tl.umulhi(c0, MULTIPLIER_0)
        low_1, high_1 = c2 * MULTIPLIER_1, tl.umulhi(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += WEYL_0
        key_1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _negative_log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    f = (bits - (exponent << MANTISSA_BITS)).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    p = (P2 * z + P1) * z + P0
    return exponent.to(tl.float32) * MINUS_LOG_2 + s * p
