"""Report of the compression of a batch, as allocated and counted, not as configured."""

from __future__ import annotations

from dataclasses import dataclass

from ssd_export.bundle import BundleConfig
from ssd_export.dtypes import DTYPES
from ssd_export.policy.schedule import tokens_evicted
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner


@dataclass(frozen=True)
class CacheReport:
    """Sizes of the caches of a batch, as allocated.

    Attributes:
        bytes: all cache tensors of the batch.
        bytes_per_image: those of one image's rows.
        image_bytes_per_image: its image slots alone.
        full_image_bytes_per_image: a slot for every image token and head, keys and values.
        tokens_evicted: (layer, KV head, token) triples evicted while one image is generated.
    """

    bytes: int
    bytes_per_image: int
    image_bytes_per_image: int
    full_image_bytes_per_image: int
    tokens_evicted: int

    @property
    def image_share(self) -> float:
        """Image slots as a share of a full cache's."""
        return self.image_bytes_per_image / self.full_image_bytes_per_image


def cache_report(runner: Runner, config: BundleConfig, batch: PromptBatch) -> CacheReport:
    """The report of a batch after its prefill; proves that what is allocated is what the policy
    promises. Raises: RuntimeError if not (a bug).
    """
    table, model = config.policy, config.model
    size, rows = DTYPES[config.dtype].num_bytes, model.rows_per_image
    allocated = runner.cache_bytes()
    promised = table.cache_bytes(model, size, rows * batch.num_images)
    if allocated != promised:
        raise RuntimeError(
            f"the runner holds {allocated} cache bytes, the policy table says {promised}"
        )
    return CacheReport(
        bytes=allocated,
        bytes_per_image=allocated // batch.num_images,
        image_bytes_per_image=table.image_cache_bytes(model, size, rows),
        full_image_bytes_per_image=table.full_image_cache_bytes(model, size, rows),
        tokens_evicted=sum(
            tokens_evicted(table, length) for length in batch.lengths[:: batch.num_images].tolist()
        ),
    )
