"""Resources for batches of one size: a context of each engine, buffers, and the CUDA graphs of a
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from ssd_export.tensorrt.batch_memory import BatchMemory
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.device_noise import DeviceNoise
from ssd_export.tensorrt.engine import TrtContext
from ssd_export.tensorrt.engine_files import EngineFiles
from ssd_export.tensorrt.loaded_engines import LoadedEngines
from ssd_export.tensorrt.profiles import IMAGE_DECODER
from ssd_export.tensorrt.prompt_rows import prompt_sizes
from ssd_export.tensorrt.step_form import DECODE_WINDOW
from ssd_export.tensorrt.step_graphs import EVICT, EVICT_AND_STEP, STEP, StepGraphs
from ssd_export.tensorrt.window_pass import WindowPass


class AllocatedBatch:
    """Contexts of all engines at the sizes of a batch, and a trial run of what will be captured.

    Args: rows: of the batch; evicts: whether evictions have their own engine.
    Raises: UserError for a size that the engines do not take, or too little device memory.
    """

    def __init__(
        self,
        device: CudaDevice,
        files: EngineFiles,
        engines: LoadedEngines,
        num_images: int,
        rows: int,
        top_k: bool,
        evicts: bool,
    ) -> None:
        self.num_images, self.top_k, self._device = num_images, top_k, device
        suffix = "_top_k" * top_k
        self.prefill = engines.context(f"prefill{suffix}", num_images)
        self.prompt_sizes = [
            size
            for size in prompt_sizes(num_images)
            if files.min_images <= size
            and engines.context(f"prefill{suffix}", size) is self.prefill
        ]
        self._decode = engines.context(f"decode_step{suffix}", num_images)
        self._evict = engines.context(EVICT, num_images) if evicts else None
        at_a_time = {1, min(files.decoder_images, num_images)} & {1, files.decoder_images}
        self.decoders = {count: engines.context(IMAGE_DECODER, count) for count in at_a_time}
        self.memory = BatchMemory(
            device,
            self._decode,
            [self.prefill, *self.decoders.values(), *self._evicts],
            self._sizes(rows, files.prompt_slots),
        )
        self._prompt_slots, self._rows_per_image = files.prompt_slots, rows // num_images
        with ExitStack() as undo:
            undo.callback(self.memory.close)
            self._try_out(rows)
            captures = all(context.is_capturable() for context in (self._decode, *self._evicts))
            kinds = {
                STEP: self.queue_step,
                EVICT: self.queue_evict,
                EVICT_AND_STEP: self._queue_evict_and_step,
            }
            self.graphs = StepGraphs(device, kinds, captures)
            undo.pop_all()
        self._engines, self._rows, self._pass_window = engines, rows, files.window
        self.window: WindowPass | None = None

    def run_prefill(self, embeds: np.ndarray, lengths: np.ndarray) -> None:
        """Queues the prefill of these rows, as many as a number of prompt_sizes has.

        Args: embeds: float32 [rows, prompt slots, condition_dim]; lengths: int32 [rows].
        """
        images = len(lengths) // self._rows_per_image
        self.memory.upload_first("inputs_embeds", embeds, self.prefill.name)
        self.memory.upload_first("prompt_length", lengths)
        sizes = {"images": images, "rows": len(lengths), "prompt_tokens": self._prompt_slots}
        self.memory.resize(self.prefill, sizes)
        self.prefill.enqueue()

    def queue_step(self) -> None:
        """Queues the decode step, then what its outputs are copied to."""
        self._decode.enqueue()
        self.memory.carry(self._decode)

    def queue_evict(self) -> None:
        """Queues the evict graph; nothing where the decode step evicts by itself (R7)."""
        for context in self._evicts:
            context.enqueue()
            self.memory.carry(context)

    def queue_evict_rows(self, rows: Sequence[int]) -> None:
        """The same for some rows of the batch alone."""
        for context in self._evicts:
            context.enqueue()
            self.memory.carry_rows(context, rows)

    def window_pass(self, noise: DeviceNoise) -> WindowPass:
        """The pass of lookahead, allocated when it is first asked for.

        Raises: UserError where its engine does not take this many images, or for too little device
        memory.
        """
        if self.window is None:
            context = self._engines.context(
                f"{DECODE_WINDOW}{'_top_k' * self.top_k}", self.num_images
            )
            sizes = {"images": self.num_images, "rows": self._rows, "window": self._pass_window}
            self.window = WindowPass(self._device, context, self.memory, sizes, noise.windows())
        return self.window

    def close(self) -> None:
        """Frees graphs and buffers; contexts are the engines'."""
        with ExitStack() as last_first:
            last_first.callback(self.close_memory)
            last_first.callback(self.close_graphs)

    def close_memory(self) -> None:
        """Frees the buffers alone, after what runs on them."""
        with ExitStack() as last_first:
            last_first.callback(self.memory.close)
            if self.window is not None:
                last_first.callback(self.window.close_memory)

    def close_graphs(self) -> None:
        """Frees the graphs alone: what runs goes before what it runs on."""
        with ExitStack() as last_first:
            last_first.callback(self.graphs.close)
            if self.window is not None:
                last_first.callback(self.window.close_graphs)

    def _queue_evict_and_step(self) -> None:
        self.queue_evict()
        self.queue_step()

    @property
    def _evicts(self) -> list[TrtContext]:
        return [self._evict] if self._evict else []

    def _sizes(self, rows: int, prompt_slots: int) -> dict[str, dict[str, int]]:
        """Numbers for the named dimensions of each context. The prompt has always its greatest
        length: with fixed shapes nothing is planned or compiled again.
        """
        batch = {"images": self.num_images, "rows": rows}
        sizes = {context.name: batch for context in (self._decode, *self._evicts)}
        sizes |= {context.name: {"images": n} for n, context in self.decoders.items()}
        return sizes | {self.prefill.name: batch | {"prompt_tokens": prompt_slots}}

    def _try_out(self, rows: int) -> None:
        """Runs on empty caches what will be captured: TensorRT loads and compiles kernels on the
        first run.
        """
        self.memory.clear()
        self.memory.upload("prompt_length", np.ones(rows, np.int32))
        self.memory.upload("step", np.ones(1, np.int64))
        self.queue_evict()
        self.queue_step()
        self._device.synchronize()
