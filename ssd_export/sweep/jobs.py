"""Defaults of a sweep: how many processes, and how many images each generates at once.

A model with short steps leaves a second thread little to do: there one process for each core
generates twice as much. A large one fills every core by itself, and each process holds its weights
twice.
"""

from __future__ import annotations

from ssd_export.config import EMBED_TOKENS
from ssd_export.errors import UserError
from ssd_export.machine import free_bytes, gib, num_cpus
from ssd_export.metrics.teacher_forced import ROWS
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.runtime.small_models import is_small

LIBRARIES_BYTES = 350_000_000  # Python, torch, ONNX Runtime
COPIES = 3  # of the weights: torch's, and ONNX Runtime's as stored and packed
MAPS = 6  # of a layer's attention that are alive at once, teacher-forced
PROMPT = 64


def process_bytes(checkpoint: Checkpoint, batch: int) -> int:
    """Bytes that one process of a sweep holds at most, about."""
    config = checkpoint.config
    weights = sum(
        _num_values(checkpoint, name) for name in checkpoint.names() if name != EMBED_TOKENS
    )
    slots, rows = PROMPT + config.grid.num_tokens, config.rows_per_image * batch
    caches = rows * config.num_layers * config.num_kv_heads * slots * (2 * config.head_dim + 2)
    maps = MAPS * ROWS * config.num_heads * slots * slots
    return LIBRARIES_BYTES + 4 * (COPIES * weights + caches + maps)


def _num_values(checkpoint: Checkpoint, name: str) -> int:
    count = 1
    for size in checkpoint.shape(name):
        count *= size
    return count


def settle_jobs(jobs: int | None, checkpoint: Checkpoint, batch: int, on_cpu: bool) -> int:
    """The number asked for, or one for each core that memory allows where the model is small.

    Raises: UserError for more than memory allows.
    """
    each, free = process_bytes(checkpoint, batch), free_bytes()
    fit = jobs or num_cpus() if free is None else max(1, free // each)
    if jobs is None:
        return min(num_cpus(), fit) if on_cpu and is_small(checkpoint.config) else 1
    if jobs > fit:
        raise UserError(
            f"--jobs {jobs} takes about {gib(jobs * each)} of memory and {gib(free or 0)} are free;"
            f" use --jobs {fit}, or a smaller --batch than {batch}"
        )
    return jobs
