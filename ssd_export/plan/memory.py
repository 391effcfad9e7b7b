"""Memory that the stages take of this machine, and the refusal where that is more than it has.

Every number here is an estimate of the peak that the system counts as resident; tests/plan compares
them with runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssd_export.config import ModelConfig
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.machine import free_bytes, gib, resident_bytes
from ssd_export.plan.sizes import WeightSizes

GRAPH_WRITING_BYTES = 24_000_000  # the graphs, which hold no weights, and the journal
READING_BYTES_OF_AN_ENTRY = 850  # of tokenizer.json, while it is read
ALLOCATED_SHARE = (
    1.1  # of a tensor's working memory: what the allocator and the reading of the file add
)
GENERATION_BASE_BYTES = 96_000_000  # Python, numpy, ONNX Runtime, tokenizer, noise
# Copies of the weights that ONNX Runtime's CPU kernels hold: packed, and fp16 widened, for it is
# multiplied as fp32.
COPIES = {"float32": 1.05, "float16": 2.1, "bfloat16": 2.1}
# What they were packed from is freed; the C library keeps small blocks of it for later, and returns
# large ones.
KEPT_COPIES = {"float32": 0.95, "float16": 0.4, "bfloat16": 0.4}
KEPT_BYTES = 130_000_000
COPIES_OF_CODES = 1.5  # while a session is made
COPIES_OF_CODES_LATER = 1.25
# Of the machine's memory: more than this, and float16 matrices are widened when they are used.
WIDENED_SHARE = 0.75
# Of the image decoder's largest size, alive at once; one of them widened by a convolution.
FEATURE_MAPS = 5


def export_bytes(working: Iterable[int], unread_vocabulary: int = 0) -> int:
    """Peak of an export in a process that has loaded what exporting needs, as this one has.

    Args: working: for every tensor of the weights file, the memory that making it takes;
    unread_vocabulary: entries of a tokenizer that this process has not read and the export will.
    """
    reading = READING_BYTES_OF_AN_ENTRY * unread_vocabulary
    return resident_bytes() + reading + GRAPH_WRITING_BYTES + int(ALLOCATED_SHARE * max(working))


def widens_on_use(sizes: WeightSizes, dtype: str, memory: int | None) -> bool:
    """Whether generating on the CPU widens float16 matrices one at a time, slower, because all at
    once are too much.

    The machine's memory decides, not what is free of it: the same machine generates the same
    images.
    """
    return (
        dtype == "float16"
        and memory is not None
        and _session_bytes(sizes, dtype) > WIDENED_SHARE * memory
    )


def generation_bytes(
    config: ModelConfig,
    sizes: WeightSizes,
    dtype: str,
    cache_bytes: int,
    decoder_batch: int = 1,
    memory: int | None = None,
    decodes_beside: bool = False,
) -> int:
    """Peak of generating with ONNX Runtime on the CPU: the decode step's session stays while images
    are decoded.

    Args: cache_bytes: of all images that are generated at once; memory: of the machine that will
    generate, None if unknown; decodes_beside: images of one batch are decoded while the next opens
    its prefill.
    """
    if widens_on_use(sizes, dtype, memory):
        making = sizes.steps + widest_matrices_bytes(config) + COPIES_OF_CODES * sizes.codes
    else:
        making = _session_bytes(sizes, dtype)
    decoder = COPIES[dtype] * sizes.image_decoder + image_decoder_bytes(
        config, "float32", decoder_batch
    )
    decoding = making + decoder
    if not decodes_beside:
        decoding -= (COPIES_OF_CODES - COPIES_OF_CODES_LATER) * sizes.codes
    kept = min(KEPT_COPIES[dtype] * (sizes.steps + sizes.image_decoder), KEPT_BYTES)
    return int(GENERATION_BASE_BYTES + cache_bytes + max(making, decoding) + kept)


def widest_matrices_bytes(config: ModelConfig) -> int:
    """The two kinds that the allocator holds blocks for, in float32: of the gated MLP and of the
    generation head.
    """
    return 4 * config.hidden_size * (2 * config.intermediate_size + config.codebook_size)


def _session_bytes(sizes: WeightSizes, dtype: str) -> float:
    """Bytes of the session of prefill or the decode step, every weight as the kernels want it."""
    return COPIES[dtype] * sizes.steps + COPIES_OF_CODES * sizes.codes


def image_decoder_bytes(config: ModelConfig, dtype: str, decoder_batch: int) -> int:
    """Activations of the image decoder: feature maps of the full size, at the width of the last
    level.
    """
    size, pixels = DTYPES[dtype].num_bytes, config.image_height * config.image_width
    return FEATURE_MAPS * decoder_batch * config.vq.base_channels * pixels * size


def check_fits(what: str, needed: int, ways_out: Sequence[str], free: int | None = None) -> None:
    """Raises UserError with at least three ways out where less is free than is needed.

    Args: what: "exporting"; ways_out: those that this stage alone has; free: None asks the system.
    """
    free = free_bytes() if free is None else free
    if free is None or needed <= free:
        return
    general = (
        f"free memory or add {gib(needed - free)} of swap",
        "try all the same with --force-memory",
    )
    ways = [*ways_out, *general]
    raise UserError(
        f"{what} needs about {gib(needed)} of memory and {gib(free)} are free:"
        f" {', '.join(ways[:-1])}, or {ways[-1]}"
    )
