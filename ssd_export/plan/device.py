"""The memory of the machine that will generate, part by part: what a table shows and what --fit
adds up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ssd_export.config import ModelConfig
from ssd_export.dtypes import DTYPES
from ssd_export.plan.memory import image_decoder_bytes
from ssd_export.plan.sizes import WeightSizes
from ssd_export.policy.table import BYTES_POSITION, BYTES_SCORE, PolicyTable

CONTEXT_BYTES = (
    600 << 20
)  # CUDA context, TensorRT and its libraries: an estimate, no GPU was at hand
SYSTEM_SHARE = 0.12  # of a board whose GPU shares the memory with the system


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device that generates num_images images at once with TensorRT.

    keys_and_values: by how heads keep tokens, "all", "by position" or "by score".
    """

    weights: int
    keys_and_values: dict[str, int]
    positions_and_scores: int
    activations: int
    image_decoder: int
    context: int = CONTEXT_BYTES

    @property
    def cache(self) -> int:
        """Bytes of all caches."""
        return sum(self.keys_and_values.values()) + self.positions_and_scores

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.cache + self.activations + self.image_decoder + self.context

    def parts(self) -> list[tuple[str, int]]:
        """The rows of a table, in its order."""
        kinds = [
            (f"keys and values, heads that keep {kind}", size)
            for kind, size in self.keys_and_values.items()
        ]
        return [
            ("weights", self.weights),
            *kinds,
            ("positions and scores", self.positions_and_scores),
            ("activations", self.activations),
            ("image decoder", self.image_decoder),
            ("context and libraries (estimate)", self.context),
        ]


def device_memory(
    config: ModelConfig,
    table: PolicyTable,
    sizes: WeightSizes,
    dtype: str,
    num_images: int,
    decoder_batch: int = 1,
    shared_weights: bool = True,
) -> DeviceMemory:
    """Memory that generating takes on a device; the text embeddings stay on the host.

    shared_weights: prefill and decode step are given one copy of their weights. Quantized matrices
    stay inside the engines, one copy in each.
    """
    rows = config.rows_per_image * num_images
    keys_and_values: dict[str, int] = {}
    for layer in table.layers:
        for group in layer:
            kind = (
                "all"
                if not group.can_fill(table.prompt_slots, table.grid)
                else "by score"
                if group.rule.by_score
                else "by position"
            )
            own = replace(table, layers=((group,),)).cache_bytes(
                config, DTYPES[dtype].num_bytes, rows
            )
            beside = (
                rows
                * group.num_heads
                * group.num_slots
                * (BYTES_POSITION + BYTES_SCORE * group.rule.by_score)
            )
            keys_and_values[kind] = keys_and_values.get(kind, 0) + own - beside
    cache = table.cache_bytes(config, DTYPES[dtype].num_bytes, rows)
    return DeviceMemory(
        weights=sizes.steps * (1 if shared_weights else num_engines(table))
        + num_engines(table) * sizes.codes
        + sizes.image_decoder,
        keys_and_values=keys_and_values,
        positions_and_scores=cache - sum(keys_and_values.values()),
        activations=activation_bytes(config, table, dtype, rows),
        image_decoder=image_decoder_bytes(config, dtype, decoder_batch),
    )


def num_engines(table: PolicyTable) -> int:
    """Engines that hold the language model: prefill, decode step and, in a bundle that is made for
    it, the pass of lookahead.
    """
    return 2 if table.lookahead is None else 3


def activation_bytes(config: ModelConfig, table: PolicyTable, dtype: str, rows: int) -> int:
    """Bytes of activations of prefill, the larger of the two graphs: the widest layer's inputs and
    outputs, attention, keys and values; and logits and noise of a pass of lookahead.
    """
    tokens = rows * table.prompt_slots
    numbers = tokens * (3 * config.hidden_size + 3 * config.intermediate_size)
    prompt = 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens
    scores = 4 * 2 * tokens * config.num_heads * table.prompt_slots
    drawn = 4 * 3 * rows * (table.lookahead or 1) * config.codebook_size
    return (numbers + prompt) * DTYPES[dtype].num_bytes + scores + drawn


def usable_bytes(memory_bytes: int, shared: bool) -> int:
    """Bytes that a device of that size leaves us. shared: its system lives in the same memory."""
    return int(memory_bytes * (1 - SYSTEM_SHARE)) if shared else memory_bytes
