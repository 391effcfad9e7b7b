"""Checks the memory of this machine against what a bundle needs, before any weights are loaded."""

from __future__ import annotations

from ssd_export.bundle import Bundle
from ssd_export.dtypes import DTYPES
from ssd_export.machine import total_bytes
from ssd_export.plan.memory import check_fits, generation_bytes
from ssd_export.plan.sizes import WeightSizes


def check_memory(
    bundle: Bundle, num_images: int, decoder_batch: int = 1, decodes_beside: bool = False
) -> None:
    """Raises UserError where generating that many images at once with ONNX Runtime on this CPU
    takes more memory than is free.

    Args: decodes_beside: there are several batches (generation_bytes).
    """
    sizes, dtype = WeightSizes.of_bundle(bundle), bundle.config.dtype
    cache = cache_bytes(bundle, num_images)
    needed = generation_bytes(
        bundle.config.model, sizes, dtype, cache, decoder_batch, total_bytes(), decodes_beside
    )
    ways_out = [f"generate fewer at once with --batch {max(1, num_images // 2)}"] * (num_images > 1)
    check_fits(
        "generating",
        needed,
        (*ways_out, "export with --weights int4", "export with a smaller --budget"),
    )


def check_caches(bundle: Bundle, num_images: int) -> None:
    """Raises UserError where the caches of so many images alone are more than is free here."""
    check_fits(
        f"the caches of {num_images} images at once",
        cache_bytes(bundle, num_images),
        (f"generate fewer at once with --batch {max(1, num_images // 2)}",),
    )


def cache_bytes(bundle: Bundle, num_images: int) -> int:
    """Bytes of the caches of so many images at once."""
    config = bundle.config
    rows = config.model.rows_per_image * num_images
    return config.policy.cache_bytes(config.model, DTYPES[config.dtype].num_bytes, rows)
