"""The table that `plan` prints: every stage from the checkpoint to an image, what it takes and
whether that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssd_export.config import ModelConfig
from ssd_export.dtypes import DTYPES
from ssd_export.machine import total_bytes
from ssd_export.plan.device import DeviceMemory, device_memory, num_engines
from ssd_export.plan.memory import generation_bytes, widens_on_use
from ssd_export.plan.sizes import WeightSizes
from ssd_export.policy.table import PolicyTable

GRAPH_BYTES_OF_A_LAYER = 110_000  # of all graphs together
TOKENIZER_BYTES_OF_AN_ENTRY = 64
COPIES_WHILE_BUILDING = 3
BUILDS_ANYWHERE = ("tensorrt-rtx",)  # engines for GPUs that are not there
BUILD, BUILD_ON_DEVICE = "build-engine", "build-engine on the device"
BUILD_BASE_BYTES = {
    "tensorrt-rtx": 1 << 30,
    "tensorrt": 2 << 30,
}  # the second is a guess: no GPU was at hand
# Bytes a second, on the slow side, for a class of time and not a promise.
DOWNLOAD_RATE, EXPORT_RATE, BUILD_RATE, HOST_RATE = 10e6, 60e6, 150e6, 8e9
WIDENING_TAKES = 4  # times as long as with weights widened once
CLASSES = ((10, "seconds"), (60, "under a minute"), (600, "minutes"), (3600, "tens of minutes"))


@dataclass(frozen=True)
class Stage:
    """Memory and disk of one stage in bytes; 0 where it takes none, None where unknown. time: its
    class in words.
    """

    name: str
    host_bytes: int | None
    disk_bytes: int
    device_bytes: int
    time: str


@dataclass(frozen=True)
class Plan:
    """All that is asked for, in bytes. download_bytes: 0 where the checkpoint is here; export_peak:
    of this machine; workspace_bytes: of the builder; bundle: the folder of export.
    """

    config: ModelConfig
    table: PolicyTable
    sizes: WeightSizes
    dtype: str
    num_images: int
    decoder_batch: int
    download_bytes: int
    export_peak: int
    flavor: str | None
    shared_weights: bool
    workspace_bytes: int
    bundle: Path

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of all images generated at once."""
        rows = self.config.rows_per_image * self.num_images
        return self.table.cache_bytes(self.config, DTYPES[self.dtype].num_bytes, rows)

    @property
    def device(self) -> DeviceMemory:
        """Memory of the device that generates."""
        return device_memory(
            self.config,
            self.table,
            self.sizes,
            self.dtype,
            self.num_images,
            self.decoder_batch,
            self.shared_weights,
        )

    @property
    def generation_peak(self) -> int:
        """Peak bytes of generating on this CPU."""
        return generation_bytes(
            self.config, self.sizes, self.dtype, self.cache_bytes, self.decoder_batch, total_bytes()
        )

    @property
    def bundle_bytes(self) -> int:
        """Bytes of the bundle on disk."""
        graphs = GRAPH_BYTES_OF_A_LAYER * self.config.num_layers
        return self.sizes.total + graphs + TOKENIZER_BYTES_OF_AN_ENTRY * self.config.vocab_size

    @property
    def engine_bytes(self) -> int:
        """Bytes of all engines: their weights, but for those that are inputs."""
        inside = self.sizes.codes + (0 if self.shared_weights else self.sizes.steps)
        return num_engines(self.table) * inside + self.sizes.image_decoder

    def stages(self) -> list[Stage]:
        """The stages in order, download to generation."""
        stages = []
        if self.download_bytes:
            seconds = self.download_bytes / DOWNLOAD_RATE
            stages.append(Stage("download", 0, self.download_bytes, 0, time_class(seconds)))
        exporting = time_class(self.sizes.total / EXPORT_RATE)
        stages.append(Stage("export", self.export_peak, self.bundle_bytes, 0, exporting))
        if self.flavor is not None:
            stages.append(self._build())
        seconds = (
            self.config.grid.num_tokens
            * (self.sizes.steps + self.sizes.codes)
            * max(1, self.num_images / 4)
            / HOST_RATE
        )
        if widens_on_use(self.sizes, self.dtype, total_bytes()):
            seconds *= WIDENING_TAKES
        generating = Stage(
            "generate on this CPU (ort)", self.generation_peak, 0, 0, time_class(seconds)
        )
        on_device = Stage(
            "generate on the device (trt)", None, 0, self.device.total, "seconds to minutes"
        )
        return [*stages, generating] + [on_device] * (self.flavor is not None)

    def _build(self) -> Stage:
        inside = (
            self.sizes.codes
            + self.sizes.image_decoder
            + (0 if self.shared_weights else self.sizes.steps)
        )
        flavor = self.flavor or "tensorrt"
        inputs = self.sizes.steps if self.shared_weights else 0
        return Stage(
            BUILD if flavor in BUILDS_ANYWHERE else BUILD_ON_DEVICE,
            build_bytes(flavor, inside, inputs, self.workspace_bytes),
            self.engine_bytes,
            0,
            time_class(60 + inside / BUILD_RATE),
        )


def build_bytes(flavor: str, inside: int, inputs: int, workspace: int) -> int:
    """Peak of building engines on the host, in bytes.

    Args: inside: weights that stay inside the engines; inputs: weights that engines are given;
    workspace: of the builder. A builder that times its tactics on the GPU has the last two there,
    which on a board is the same memory.
    """
    on_device = 0 if flavor in BUILDS_ANYWHERE else inputs + workspace
    return BUILD_BASE_BYTES[flavor] + COPIES_WHILE_BUILDING * inside + on_device


def time_class(seconds: float) -> str:
    """A duration in words: seconds, minutes or hours."""
    return next((name for limit, name in CLASSES if seconds <= limit), "hours")
