"""TensorRT as a Runner: tokens, caches, sampling and releases stay on the GPU, and a step is one
CUDA graph.

All device memory is allocated before the first step: the weights once, and one stretch for each
batch size (device_buffers.py). No cache is copied between steps; what an engine does not write in
place (step_form.py), a few bytes a slot, is. The host reads tokens after a grid row, never inside one.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.bundle.graphs import num_sorted_codes
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.runtime.finite import to_pixels
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner
from ssd_export.tensorrt.batch_memory import BatchMemory
from ssd_export.tensorrt.cuda_device import NO_GPU, CudaDevice, open_driver
from ssd_export.tensorrt.device_noise import DeviceNoise
from ssd_export.tensorrt.engine_files import EngineFiles, find_engines
from ssd_export.tensorrt.loaded_engines import LoadedEngines
from ssd_export.tensorrt.profiles import IMAGE_DECODER
from ssd_export.tensorrt.step_graphs import StepGraphs
from ssd_export.tensorrt.target import gpu_here

EVICT = "evict"


def open_device(bundle: Bundle) -> tuple[EngineFiles, CudaDevice]:
    """The bundle's engines for this machine, and its GPU.

    Raises: UserError, one line, for no GPU, no engines, none that fit, or a package that is
    missing.
    """
    capability = gpu_here()
    if capability is None:
        raise UserError(NO_GPU)
    return find_engines(bundle, capability), CudaDevice(open_driver())


def limited_top_k(top_k: np.ndarray, codebook_size: int) -> np.ndarray:
    """top_k as engines take it: 0 where it keeps every code. Raises: UserError for a number of codes
    that TensorRT does not sort."""
    kept = np.where(top_k >= codebook_size, 0, top_k)
    most = num_sorted_codes(codebook_size)
    if kept.max() > most:
        raise UserError(
            f"top_k {kept.max()} is above {most}, the most codes that TensorRT sorts; use {most} or"
            " fewer, 0 for all, or --runner ort"
        )
    return kept


class TrtRunner(Runner):
    """Engines are loaded when first needed and kept; a batch of another size gets new buffers and
    graphs.

    Raises: UserError for a plugin library that is missing, or too little device memory.
    """

    queues_steps = True

    def __init__(self, bundle: Bundle, files: EngineFiles, device: CudaDevice) -> None:
        self._device, self._files, self._dtype = device, files, bundle.config.dtype
        self.max_images = files.max_images
        specs = bundle.config.graphs
        self._config = bundle.config.model
        self._evicts = EVICT in specs and not files.releases_in_step
        self._rows_per_image = bundle.config.model.rows_per_image
        self._engines = LoadedEngines(files, specs, device)
        self._noise = DeviceNoise(device, self._config)
        self._batch: tuple[int, bool] | None = None  # images, top-k
        self._memory: BatchMemory | None = None
        self._graphs: StepGraphs | None = None

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        provider: str = "cuda",
        num_threads: int | None = None,
        exact: bool = False,
    ) -> TrtRunner:
        """The bundle's engines on this machine's GPU; nothing is left to the arguments."""
        return cls(bundle, *open_device(bundle))

    def prefill(self, batch: PromptBatch) -> None:
        self._allocate(batch.num_images, batch.uses_top_k)
        self._memory.clear()
        numbers = {
            "prompt_length": batch.lengths,
            "step": np.ones(1, np.int64),
            **batch.sampling_inputs(),
        }
        top_k = limited_top_k(numbers.pop("top_k"), self._config.codebook_size)
        if batch.uses_top_k:
            numbers["top_k"] = top_k
        for name, values in numbers.items():
            self._memory.upload(name, values)
        self._needs_noise = not batch.is_greedy  # whose noise stays 0, as the memory was cleared
        self._noise.start(batch.images, self._memory.address("noise"))
        self._reach_noise(0)
        prefill = self._prefill.name
        self._memory.upload("inputs_embeds", self._padded(batch.embeds), prefill)
        self._prefill.enqueue()
        self._memory.fill_caches(prefill, batch.lengths)
        self._step = 1

    def evict(self, step: int) -> None:
        """Nothing with the plugin, which releases in the step (R7)."""
        self._go_to(step)
        if self._evicts:
            self._queue_evict()

    def decode_step(self, step: int) -> None:
        self._go_to(step)
        self._reach_noise(step)
        self._queue_step()
        self._step = step + 1

    def decode_row(self, steps: range, releases: Collection[int]) -> None:
        """One launch a step; returns at once. The steps are of one grid row."""
        self._go_to(steps.start)
        self._reach_noise(steps.start)
        for step in steps:
            self._graphs.launch(self._evicts and step in releases)
        self._step = steps.stop

    def tokens(self) -> np.ndarray:
        return self._memory.download("tokens").T.copy()

    def logits(self) -> np.ndarray:
        return self._memory.download("logits")

    def read_cache(self, tensor: CacheTensor) -> np.ndarray:
        """A copy of a cache tensor; bfloat16 as float32."""
        values = self._memory.download(tensor.past)
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def write_cache(self, tensor: CacheTensor, values: np.ndarray) -> None:
        """Overwrites a cache tensor; a bfloat16 is the upper half of its float32."""
        dtype = self._memory.buffer(tensor.past).stored_dtype
        if dtype == np.uint16:
            values = values.view(np.uint32) >> 16
        self._memory.upload(tensor.past, np.ascontiguousarray(values.astype(dtype, copy=False)))

    def force_tokens(self, step: int, tokens: np.ndarray) -> None:
        """Makes int32 [N] the tokens of a step."""
        every = self._memory.download("tokens")
        every[step] = tokens
        self._memory.upload("tokens", every)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """As many at a time as the engine takes, the rest one by one."""
        if self._batch is None:
            self._allocate(self._files.min_images, top_k=False)
        images, start = [], 0
        while start < len(tokens):
            count = max(n for n in self._decoders if n <= len(tokens) - start)
            context = self._decoders[count]
            codes = np.asarray(tokens[start : start + count], np.int32)
            self._memory.upload("codes", codes, context.name)
            context.enqueue()
            levels = self._memory.download("pixels", context.name)
            images.append(to_pixels(levels, self._dtype))
            start += count
        return np.concatenate(images)

    def cache_bytes(self) -> int:
        return self._memory.cache_bytes()

    def memory_report(self) -> dict[str, int]:
        """Device bytes: engine files, the weights they share, the buffers of this batch and the
        caches among these, and CUDA graphs.
        """
        return {
            "engines": self._engines.file_bytes,
            "weights": self._engines.weight_bytes,
            "buffers": self._memory.plan.num_bytes,
            "caches": self.cache_bytes(),
            "graphs": self._graphs.num_bytes,
        }

    def graph_nodes(self) -> dict[str, int]:
        """Nodes of the CUDA graphs captured for this batch size; empty where none was."""
        return self._graphs.num_nodes if self._graphs else {}

    def synchronize(self) -> None:
        self._device.synchronize()

    def close(self) -> None:
        """Destroys what runs before what it runs on: graphs, contexts, engines, then buffers,
        stream and the GPU's context. Does all of it, whatever fails on the way.
        """
        if self._device is None:
            return
        with ExitStack() as last_first:
            last_first.callback(self._device.close)
            if self._memory is not None:
                last_first.callback(self._memory.close)
            last_first.callback(self._engines.close)
            last_first.callback(self._noise.close)
            if self._graphs is not None:
                last_first.callback(self._graphs.close)
            last_first.callback(self._device.synchronize)
            self._graphs, self._memory, self._batch, self._device = None, None, None, None
            self._prefill, self._decode, self._evict, self._decoders = None, None, None, {}

    def _allocate(self, num_images: int, top_k: bool) -> None:
        """Contexts, buffers and addresses for a batch of this size, and a trial run of what will be
        captured.
        """
        if self._batch == (num_images, top_k):
            return
        self._files.check_batch(num_images)
        self._release_batch()
        suffix, rows = "_top_k" * top_k, self._rows_per_image * num_images
        batch = {"images": num_images, "rows": rows}
        self._prefill, self._decode = (
            self._engines.context(f"{graph}{suffix}", num_images)
            for graph in ("prefill", "decode_step")
        )
        self._evict = self._engines.context(EVICT, num_images) if self._evicts else None
        at_a_time = {1, min(self._files.decoder_images, num_images)}
        self._decoders = {
            count: self._engines.context(IMAGE_DECODER, count)
            for count in at_a_time & {1, self._files.decoder_images}
        }
        evicts = [self._evict] if self._evict else []
        # always the longest prompt: with fixed shapes nothing is planned or compiled again
        sizes = {self._prefill.name: batch | {"prompt_tokens": self._files.prompt_slots}}
        sizes |= {context.name: batch for context in (self._decode, *evicts)}
        sizes |= {context.name: {"images": n} for n, context in self._decoders.items()}
        others = [self._prefill, *self._decoders.values(), *evicts]
        self._memory = BatchMemory(self._device, self._decode, others, sizes)
        self._try_out(rows)
        captures = all(context.is_capturable() for context in (self._decode, *evicts))
        self._graphs = StepGraphs(self._device, self._queue_step, self._queue_evict, captures)
        self._batch = (num_images, top_k)

    def _try_out(self, rows: int) -> None:
        """Runs on empty caches what will be captured: TensorRT loads and compiles kernels on the
        first run.
        """
        self._memory.clear()
        self._memory.upload("prompt_length", np.ones(rows, np.int32))
        self._memory.upload("step", np.ones(1, np.int64))
        if self._evicts:
            self._queue_evict()
        self._queue_step()
        self._device.synchronize()

    def _padded(self, embeds: np.ndarray) -> np.ndarray:
        missing = self._files.prompt_slots - embeds.shape[1]
        return np.pad(embeds, ((0, 0), (0, missing), (0, 0)))

    def _queue_step(self) -> None:
        self._decode.enqueue()
        self._memory.carry(self._decode)

    def _queue_evict(self) -> None:
        self._evict.enqueue()
        self._memory.carry(self._evict)

    def _go_to(self, step: int) -> None:
        """The device counts steps by itself; it is told where a caller goes elsewhere."""
        if step != self._step:
            self._memory.upload("step", np.array([step], np.int64))
            self._step = step

    def _reach_noise(self, step: int) -> None:
        if self._needs_noise:
            self._noise.reach(step)

    def _release_batch(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        if self._memory is not None:
            self._memory.close()
        self._graphs, self._memory, self._batch = None, None, None
