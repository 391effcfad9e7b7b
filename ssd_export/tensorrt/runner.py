"""TensorRT as a Runner: tokens, caches, sampling and releases stay on the GPU, and a grid row is
one CUDA graph.

All device memory is allocated before the first step: the weights once, and one stretch for each
batch size (device_buffers.py). Outputs that the contract aliases get the address of their input, so
nothing is copied between steps but the step number. The host reads tokens after a row, never inside
one.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.graph_spec import CacheTensor
from ssd_export.runtime.prompt_batch import PromptBatch
from ssd_export.runtime.runner import Runner
from ssd_export.tensorrt.batch_memory import BatchMemory
from ssd_export.tensorrt.cuda_device import NO_GPU, CudaDevice, open_driver
from ssd_export.tensorrt.engine_files import EngineFiles, find_engines
from ssd_export.tensorrt.loaded_engines import LoadedEngines
from ssd_export.tensorrt.row_graphs import RowGraphs, RowKind
from ssd_export.tensorrt.target import gpu_here

EVICT, IMAGE_DECODER = "evict", "image_decoder"


def open_device(bundle: Bundle) -> tuple[EngineFiles, CudaDevice]:
    """The bundle's engines for this machine, and its GPU.

    Raises: UserError, one line, for no GPU, no engines, none that fit, or a package that is
    missing.
    """
    capability = gpu_here()
    if capability is None:
        raise UserError(NO_GPU)
    return find_engines(bundle, capability), CudaDevice(open_driver())


class TrtRunner(Runner):
    """Engines are loaded when first needed and kept; a batch of another size gets new buffers and
    graphs.

    Raises: UserError for a plugin library that is missing, or too little device memory.
    """

    def __init__(self, bundle: Bundle, files: EngineFiles, device: CudaDevice) -> None:
        self._device, self._files = device, files
        self.max_images = files.max_images
        specs = bundle.config.graphs
        self._evicts = EVICT in specs and not files.releases_in_step
        self._engines = LoadedEngines(files, specs, device)
        self._batch: tuple[int, bool] | None = None  # images, top-k
        self._memory: BatchMemory | None = None
        self._graphs: RowGraphs | None = None

    def prefill(self, batch: PromptBatch) -> None:
        self._allocate(batch.num_images, batch.sampling.top_k > 0)
        self._memory.clear()
        numbers = {
            "prompt_length": batch.lengths,
            "uniforms": batch.uniforms,
            "step": np.ones(1, np.int64),
            "cfg_scale": np.array([batch.sampling.cfg_scale], np.float32),
            "temperature": np.array([batch.sampling.temperature], np.float32),
        }
        if batch.sampling.top_k:
            numbers["top_k"] = np.array([batch.sampling.top_k], np.int64)
        for name, values in numbers.items():
            self._memory.upload(name, values)
        prefill = self._prefill.spec.name
        self._memory.upload("inputs_embeds", self._padded(batch.embeds), prefill)
        self._prefill.enqueue(self._device.stream)
        self._memory.fill_caches(prefill, batch.lengths)
        self._step = 1

    def evict(self, step: int) -> None:
        """Nothing with the plugin, which releases in the step (R7)."""
        self._go_to(step)
        if self._evicts:
            self._queue_evict()

    def decode_step(self, step: int) -> None:
        self._go_to(step)
        self._queue_step()
        self._step = step + 1

    def decode_row(self, steps: range, releases: Collection[int]) -> None:
        """One launch; returns at once."""
        self._go_to(steps.start)
        self._graphs.launch(tuple(self._evicts and step in releases for step in steps))
        self._step = steps.stop

    def tokens(self) -> np.ndarray:
        return self._memory.download("tokens").T.copy()

    def logits(self) -> np.ndarray:
        return self._memory.download("logits")

    def cache(self, tensor: CacheTensor) -> np.ndarray:
        """A copy of a cache tensor; bfloat16 as its uint16 bits."""
        return self._memory.download(tensor.past)

    def decode_image(self, tokens: np.ndarray) -> np.ndarray:
        """As many at a time as the engine's profile asks for at least; the last are repeated to
        make up the number.
        """
        if self._batch is None:
            self._allocate(self._files.min_images, top_k=False)
        count, pictures = self._files.min_images, []
        for start in range(0, len(tokens), count):
            part = np.resize(
                np.asarray(tokens[start : start + count], np.int32), (count, tokens.shape[1])
            )
            self._memory.upload("codes", part, IMAGE_DECODER)
            self._engines[IMAGE_DECODER].enqueue(self._device.stream)
            pictures.append(self._memory.download("pixels", IMAGE_DECODER).astype(np.uint8))
        return np.concatenate(pictures)[: len(tokens)]

    def cache_bytes(self) -> int:
        return self._memory.cache_bytes()

    def memory_report(self) -> dict[str, int]:
        """Device bytes: engine files, the weights they share, the buffers of this batch, and the
        caches among these.
        """
        return {
            "engines": self._engines.file_bytes,
            "weights": self._engines.weight_bytes,
            "buffers": self._memory.plan.num_bytes,
            "caches": self.cache_bytes(),
        }

    def graph_nodes(self) -> dict[RowKind, int]:
        """Nodes of every CUDA graph captured for this batch size, by which steps begin with a
        release.
        """
        return self._graphs.num_nodes if self._graphs else {}

    def synchronize(self) -> None:
        self._device.synchronize()

    def close(self) -> None:
        if self._device is not None:
            self._release_batch()
            self._engines.close()
            self._device.close()
        self._device = None

    def _allocate(self, num_images: int, top_k: bool) -> None:
        """Engines, buffers and addresses for a batch of this size, and a trial run of what will be
        captured.
        """
        if self._batch == (num_images, top_k):
            return
        self._files.check_batch(num_images)
        self._release_batch()
        suffix = "_top_k" * top_k
        self._prefill, self._decode = (
            self._engines[f"prefill{suffix}"],
            self._engines[f"decode_step{suffix}"],
        )
        self._evict = self._engines[EVICT] if self._evicts else None
        others = [
            self._prefill,
            self._engines[IMAGE_DECODER],
            *([self._evict] if self._evict else []),
        ]
        batch = {"images": num_images, "rows": 2 * num_images}
        sizes = {  # always the longest prompt: with fixed shapes nothing is planned or compiled again
            self._prefill.spec.name: batch | {"prompt_tokens": self._files.max_prompt_tokens},
            self._decode.spec.name: batch,
            EVICT: batch,
            IMAGE_DECODER: {"images": self._files.min_images},
        }
        self._memory = BatchMemory(self._device, self._decode, others, sizes)
        self._try_out(num_images)
        self._graphs = RowGraphs(self._device, self._queue_step, self._queue_evict)
        self._batch = (num_images, top_k)

    def _try_out(self, num_images: int) -> None:
        """Runs on empty caches what will be captured: TensorRT loads and compiles kernels on the
        first run.
        """
        self._memory.clear()
        self._memory.upload("prompt_length", np.ones(2 * num_images, np.int32))
        self._memory.upload("step", np.ones(1, np.int64))
        if self._evicts:
            self._queue_evict()
        self._queue_step()
        self._device.synchronize()
        for engine in [self._decode, *([self._evict] if self._evict else [])]:
            if not engine.is_capturable(self._device.stream):
                raise UserError(
                    f"TensorRT cannot run {engine.spec.name} inside a CUDA graph; use --runner ort"
                )

    def _padded(self, embeds: np.ndarray) -> np.ndarray:
        missing = self._files.max_prompt_tokens - embeds.shape[1]
        return np.pad(embeds, ((0, 0), (0, missing), (0, 0)))

    def _queue_step(self) -> None:
        self._decode.enqueue(self._device.stream)
        # Not aliased: nothing in the graph orders this write after all that reads the step.
        self._device.copy(self._memory.address("step"), self._memory.address("next_step"), 8)

    def _queue_evict(self) -> None:
        self._evict.enqueue(self._device.stream)
        spec, memory = self._evict.spec, self._memory
        for cache in spec.cache_outputs:
            if cache.present not in spec.aliases:
                source = memory.address(cache.present, EVICT)
                self._device.copy(
                    memory.address(cache.past), source, memory.buffer(cache.past).num_bytes
                )

    def _go_to(self, step: int) -> None:
        """The device counts steps by itself; it is told where a caller goes elsewhere."""
        if step != self._step:
            self._memory.upload("step", np.array([step], np.int64))
            self._step = step

    def _release_batch(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        if self._memory is not None:
            self._memory.close()
        self._graphs, self._memory, self._batch = None, None, None
