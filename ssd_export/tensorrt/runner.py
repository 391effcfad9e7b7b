"""TensorRT as a Runner: tokens, caches, sampling and evictions stay on the GPU, and a step is one
CUDA graph.

All device memory is allocated before the first step: the weights once, and one stretch for each
batch size (device_buffers.py). No cache is copied between steps; what an engine does not write in
place (step_form.py), a few bytes a slot, is. The host reads tokens after a grid row, never inside
one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.bundle.graphs import num_sorted_codes
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.noise import ImageSeed
from ssd_export.policy.schedule import eviction_steps
from ssd_export.runtime.draw import draw_tokens
from ssd_export.runtime.finite import to_pixels
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner, WindowNoise
from ssd_export.tensorrt.allocated_batch import AllocatedBatch
from ssd_export.tensorrt.cuda_device import NO_GPU, CudaDevice, open_driver
from ssd_export.tensorrt.device_noise import DeviceNoise
from ssd_export.tensorrt.engine_files import EngineFiles, find_engines
from ssd_export.tensorrt.loaded_engines import LoadedEngines
from ssd_export.tensorrt.profiles import MOST_WITH_WINDOWS
from ssd_export.tensorrt.prompt_rows import rows_to_compute
from ssd_export.tensorrt.step_graphs import EVICT, EVICT_AND_STEP, STEP
from ssd_export.tensorrt.target import gpu_here
from ssd_export.tensorrt.window_plan import USUAL


def open_device(bundle: Bundle) -> tuple[EngineFiles, CudaDevice]:
    """The bundle's engines for this machine, and its GPU.

    Raises: UserError, one line, for no GPU, no engines, none that fit, or a package that is
    missing.
    """
    capability = gpu_here()
    if capability is None:
        raise UserError(NO_GPU)
    return find_engines(bundle, capability), CudaDevice(open_driver())


def _no_window(files: EngineFiles) -> str:
    """Why these engines take one token a pass, with the way out; "" where they take more."""
    if files.window:
        return ""
    return (
        f"these engines take one token a pass; {files.rebuild} --lookahead {USUAL}, or use"
        " --lookahead off"
    )


def limited_top_k(top_k: np.ndarray, codebook_size: int) -> np.ndarray:
    """top_k as engines take it: 0 where it keeps every code. Raises: UserError for a number of
    codes that TensorRT does not sort.
    """
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

    The device is the runner's from now on, and given back with it, also where opening it fails.

    Raises: UserError for a plugin library that is missing, or too little device memory.
    """

    queues_steps, on_gpu = True, True
    no_rows = (
        "TensorRT has no engine for grid rows in parallel; use --runner ort, or --lookahead off"
    )

    def __init__(self, bundle: Bundle, files: EngineFiles, device: CudaDevice) -> None:
        self._device, self._files, self._dtype = device, files, bundle.config.dtype
        self.max_images = files.max_images
        if not files.has("prefill_top_k"):
            self.no_top_k = "engines for top-k are built with build-engine --top-k"
        self._config, self._table = bundle.config.model, bundle.config.policy
        self.fixed_window, self.no_window = files.window, _no_window(files)
        self._evicts = EVICT in bundle.config.graphs and not files.evicts_in_step
        with ExitStack() as undo:
            undo.callback(device.close)
            self._engines = LoadedEngines(files, bundle.config.graphs, device)
            undo.callback(self._engines.close)
            self._noise = DeviceNoise(device, self._config)
            undo.pop_all()
        self._allocated: AllocatedBatch | None = None
        self._step, self._needs_noise, self._is_open = 0, False, True
        self._seeds: Sequence[ImageSeed] | None = None  # of a batch whose windows are not begun
        self._evictions: frozenset[int] = frozenset()

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
        """Fills fresh caches from the prompts and generates token 0."""
        ready = self._allocate(batch.num_images, batch.uses_top_k)
        memory = ready.memory
        memory.clear()
        numbers = {
            "prompt_length": batch.lengths,
            "step": np.ones(1, np.int64),
            **batch.sampling_inputs(),
        }
        top_k = limited_top_k(numbers.pop("top_k"), self._config.codebook_size)
        if batch.uses_top_k:
            numbers["top_k"] = top_k
        for name, values in numbers.items():
            memory.upload(name, values)
        self._needs_noise = not batch.is_greedy  # whose noise stays 0, as the memory was cleared
        self._noise.start(batch.images, memory.address("noise"))
        self._reach_noise(0)
        rows, place = rows_to_compute(batch, ready.prompt_sizes)
        ready.run_prefill(self._padded(batch.embeds[rows]), batch.lengths[rows])
        memory.fill_caches(ready.prefill, batch.lengths, place)
        if len(rows) < len(batch.lengths):
            self._draw_first(batch, place)
        self._step, self._seeds = 1, batch.images
        self._evictions = eviction_steps(self._table, batch.lengths.tolist())

    def _draw_first(self, batch: PromptBatch, place: np.ndarray) -> None:
        """Token 0 of every image, from logits of other rows than the batch's, of which the engine
        has sampled what is nobody's.
        """
        memory = self._ready.memory
        logits = memory.download_first("logits", place.max() + 1)[place]
        (noise,) = memory.download_first("noise", 1)
        tokens = draw_tokens(logits, noise, batch.sampling_inputs())
        memory.upload("logits", logits)
        memory.upload_first("tokens", tokens[None])
        memory.upload("prompt_length", batch.lengths)

    def evict(self, step: int) -> None:
        """Runs the evict engine; does nothing with the plugin, which evicts in the step (R7)."""
        self._go_to(step)
        self._ready.queue_evict()

    def decode_step(self, step: int) -> None:
        """Queues the step that generates token `step` from token `step - 1`."""
        self._go_to(step)
        self._reach_noise(step)
        self._ready.queue_step()
        self._step = step + 1

    def decode_row(self, steps: range, evictions: Collection[int]) -> None:
        """One launch a step; returns at once. The steps are of one grid row."""
        self._go_to(steps.start)
        self._reach_noise(steps.start)
        for step in steps:
            self._ready.graphs.launch(
                EVICT_AND_STEP if self._evicts and step in evictions else STEP
            )
        self._step = steps.stop

    def decode_window(
        self, first: np.ndarray, limit: np.ndarray, inputs: np.ndarray, noise: WindowNoise
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples several tokens of every image in one pass (runner.py); makes its own noise."""
        ready = self._ready
        if ready.window is None and ready.num_images > MOST_WITH_WINDOWS:
            raise UserError(
                f"engines take passes of lookahead for up to {MOST_WITH_WINDOWS} images at once,"
                f" not {ready.num_images}; use --batch {MOST_WITH_WINDOWS}, or --lookahead off"
            )
        window = ready.window_pass(self._noise)
        if self._seeds is not None:
            window.start(self._seeds, is_greedy=not self._needs_noise)
            self._seeds = None
        self._evict_images(first, limit > 0)
        return window(first, limit, inputs)

    def _evict_images(self, first: np.ndarray, active: np.ndarray) -> None:
        """Evicts what is due before each image's own step. Of other images no head is full, but for
        those that are due at another step, or done.
        """
        if not self._evicts:
            return
        ready, due = self._ready, sorted(set(first[active].tolist()) & self._evictions)
        for step in due:
            self._go_to(step)
            if len(due) == 1 and active.all():
                ready.graphs.launch(EVICT)
                continue
            images = np.flatnonzero(active & (first == step))
            places = range(self._config.rows_per_image)
            rows = [image + place * len(first) for place in places for image in images.tolist()]
            ready.queue_evict_rows(rows)

    def tokens(self) -> np.ndarray:
        """int32 [N, image tokens]; what is not generated yet is 0. Waits for the device."""
        return self._ready.memory.download("tokens").T.copy()

    def logits(self) -> np.ndarray:
        """float32 [rows, V] of the newest token, before guidance. Waits for the device."""
        return self._ready.memory.download("logits")

    def read_cache(self, tensor: CacheTensor) -> np.ndarray:
        """A copy of a cache tensor; bfloat16 as float32."""
        values = self._ready.memory.download(tensor.past)
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def write_cache(self, tensor: CacheTensor, values: np.ndarray) -> None:
        """Overwrites a cache tensor; a bfloat16 is the upper half of its float32."""
        memory = self._ready.memory
        dtype = memory.buffer(tensor.past).stored_dtype
        if dtype == np.uint16:
            values = values.view(np.uint32) >> 16
        memory.upload(tensor.past, np.ascontiguousarray(values.astype(dtype, copy=False)))

    def force_tokens(self, step: int, tokens: np.ndarray) -> None:
        """Makes int32 [N] the tokens of a step."""
        memory = self._ready.memory
        every = memory.download("tokens")
        every[step] = tokens
        memory.upload("tokens", every)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes as many images at a time as the engine takes, the rest one by one."""
        ready = self._allocated or self._allocate(self._files.min_images, top_k=False)
        images, start = [], 0
        while start < len(tokens):
            count = max(n for n in ready.decoders if n <= len(tokens) - start)
            context = ready.decoders[count]
            codes = np.asarray(tokens[start : start + count], np.int32)
            ready.memory.upload("codes", codes, context.name)
            context.enqueue()
            levels = ready.memory.download("pixels", context.name)
            images.append(to_pixels(levels, self._dtype))
            start += count
        return np.concatenate(images)

    def cache_bytes(self) -> int:
        """Bytes of the caches, as allocated."""
        return self._ready.memory.cache_bytes()

    def memory_report(self) -> dict[str, int]:
        """Device bytes: engine files, the weights they share, the buffers of this batch and the
        caches among these, and CUDA graphs.
        """
        window = self._ready.window
        return {
            "engines": self._engines.file_bytes,
            "weights": self._engines.weight_bytes,
            "buffers": self._ready.memory.plan.num_bytes + (window.num_bytes if window else 0),
            "caches": self.cache_bytes(),
            "graphs": self._ready.graphs.num_bytes,
        }

    def graph_nodes(self) -> dict[str, int]:
        """Nodes of the CUDA graphs captured for this batch size; empty where none was."""
        return self._allocated.graphs.num_nodes if self._allocated else {}

    def synchronize(self) -> None:
        """Waits until all queued work is done."""
        self._device.synchronize()

    def close(self) -> None:
        """Destroys what runs before what it runs on: graphs, contexts, engines, then buffers,
        stream and the GPU's context. Does all of it, whatever fails on the way.
        """
        if not self._is_open:
            return
        allocated, self._allocated, self._is_open = self._allocated, None, False
        with ExitStack() as last_first:
            last_first.callback(self._device.close)
            if allocated is not None:
                last_first.callback(allocated.close_memory)
            last_first.callback(self._engines.close)
            last_first.callback(self._noise.close)
            if allocated is not None:
                last_first.callback(allocated.close_graphs)
            last_first.callback(self._device.synchronize)

    @property
    def _ready(self) -> AllocatedBatch:
        if self._allocated is None:
            raise RuntimeError("no batch is under way: prefill comes first")
        return self._allocated

    def _allocate(self, num_images: int, top_k: bool) -> AllocatedBatch:
        """Allocates for a batch of this size; the memory of another size is freed first."""
        before = self._allocated
        if before is not None and (before.num_images, before.top_k) == (num_images, top_k):
            return before
        self._files.check_batch(num_images)
        self._allocated = None
        if before is not None:
            before.close()
        rows = self._config.rows_per_image * num_images
        self._allocated = AllocatedBatch(
            self._device, self._files, self._engines, num_images, rows, top_k, self._evicts
        )
        return self._allocated

    def _padded(self, embeds: np.ndarray) -> np.ndarray:
        missing = self._files.prompt_slots - embeds.shape[1]
        return np.pad(embeds, ((0, 0), (0, missing), (0, 0)))

    def _go_to(self, step: int) -> None:
        """The device counts steps by itself; it is told where a caller goes elsewhere."""
        if step != self._step:
            self._ready.memory.upload("step", np.array([step], np.int64))
            self._step = step

    def _reach_noise(self, step: int) -> None:
        if self._needs_noise:
            self._noise.reach(step)
