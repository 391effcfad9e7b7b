"""A pass of lookahead on the GPU: the engine of decode_window over the caches of a batch, in memory
that is allocated when the first pass is asked for.

Every pass has the places that the engine was built for; what it is asked for beyond the limits is
computed and not kept. So it is one CUDA graph. The host gives it steps, limits and drafts, waits
once, and reads what was sampled and how much of it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from ssd_export.noise import ImageSeed
from ssd_export.tensorrt.batch_memory import BatchMemory
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.device_buffers import WAYS_OUT, Buffer, check_device_memory, plan_buffers
from ssd_export.tensorrt.device_noise import WindowDeviceNoise
from ssd_export.tensorrt.engine import TrtContext
from ssd_export.tensorrt.step_form import carried
from ssd_export.tensorrt.step_graphs import StepGraphs

PASS = "pass"


class WindowPass:
    """The pass of one batch size.

    Args: context: of the engine; memory: of the batch, whose caches and tokens it changes; sizes:
    of the engine's named dimensions; noise: what makes noise.
    Raises: UserError for too little device memory.
    """

    def __init__(
        self,
        device: CudaDevice,
        context: TrtContext,
        memory: BatchMemory,
        sizes: dict[str, int],
        noise: WindowDeviceNoise,
    ) -> None:
        self._device, self._context, self._memory, self._noise = device, context, memory, noise
        self._num_images, self._width = sizes["images"], sizes["window"]
        spec = context.spec
        context.set_sizes(sizes)
        own = [
            tensor
            for tensor in (*spec.inputs, *spec.outputs)
            if tensor.name not in context.aliases and not memory.holds(tensor, sizes)
        ]
        sized = [tensor.resolved(sizes) for tensor in own]
        plan = plan_buffers([], {PASS: sized}, {PASS: context.scratch_bytes()})
        free = device.memory_bytes()[0]
        check_device_memory("a pass of lookahead", plan.num_bytes, free, WAYS_OUT)
        self._own, self.num_bytes = plan.private[PASS], plan.num_bytes
        self._address = device.allocate(plan.num_bytes)
        device.fill(self._address, 0, plan.num_bytes)  # the noise of a greedy batch stays 0
        start, num_bytes = plan.scratch[PASS]
        context.use_scratch(self._address + start, num_bytes)
        for tensor in (*spec.inputs, *spec.outputs):
            place = context.aliases.get(tensor.name, tensor.name)
            context.bind(tensor.name, self._place(place))
        self._copies = memory.copies_of(context) + [
            (memory.address(past), self._place(output), self._own[output].num_bytes)
            for output, past in carried(spec, context.aliases).items()
            if output in self._own
        ]
        self._graphs: StepGraphs | None = None

    def start(self, images: Sequence[ImageSeed], is_greedy: bool) -> None:
        """Takes a batch of this size."""
        buffer = self._own["noise"]
        if is_greedy:
            self._device.fill(self._address + buffer.offset, 0, buffer.num_bytes)
        self._noise.start(() if is_greedy else images)

    def __call__(
        self, first: np.ndarray, limit: np.ndarray, inputs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(sampled int32 [N, W], kept int64 [N]) of a pass; its tokens are in the grid."""
        width = inputs.shape[1]
        drafts = np.pad(inputs, ((0, 0), (0, self._width - width)))
        self._upload("window_tokens", drafts)
        self._upload("first", first)
        self._upload("limit", limit)
        self._noise.write(first, self._width, self._place("noise"))
        self._launch()
        sampled, kept = self._device.download_all(
            [(self._place(name), *_form(self._own[name])) for name in ("sampled", "kept")]
        )
        for image, (start, count) in enumerate(zip(first.tolist(), kept.tolist(), strict=True)):
            if count:
                self._keep(image, start, count)
        return sampled[:, :width].copy(), kept

    def close_memory(self) -> None:
        """Waits for the device and frees the memory; the context is the engine's."""
        with ExitStack() as last_first:
            last_first.callback(self._device.free, self._address)
            last_first.callback(self._noise.close)
            last_first.callback(self._device.synchronize)

    def close_graphs(self) -> None:
        """Frees the graph."""
        if self._graphs is not None:
            self._graphs.close()

    def _launch(self) -> None:
        """The first pass is queued as it is: TensorRT loads and compiles kernels on the first run,
        and no other pass would leave the caches as they are.
        """
        if self._graphs is not None:
            self._graphs.launch(PASS)
            return
        self._queue()
        self._device.synchronize()
        captures = self._context.is_capturable()
        self._graphs = StepGraphs(self._device, {PASS: self._queue}, captures)

    def _queue(self) -> None:
        """The engine, then what its outputs are copied to, and the logits of each first place."""
        self._context.enqueue()
        self._memory.copy(self._copies)
        rows, width, codes = self._own["logits"].shape
        self._device.copy_rows(
            target=self._memory.address("logits"),
            target_pitch=4 * codes,
            source=self._place("logits"),
            source_pitch=4 * width * codes,
            width=4 * codes,
            rows=rows,
        )

    def _keep(self, image: int, start: int, count: int) -> None:
        """Copies an image's tokens from where they were sampled into the grid of tokens."""
        self._device.copy_rows(
            target=self._memory.address("tokens") + 4 * (start * self._num_images + image),
            target_pitch=4 * self._num_images,
            source=self._place("sampled") + 4 * image * self._width,
            source_pitch=4,
            width=4,
            rows=count,
        )

    def _place(self, name: str) -> int:
        if name in self._own:
            return self._address + self._own[name].offset
        return self._memory.address(name)

    def _upload(self, name: str, array: np.ndarray) -> None:
        buffer = self._own[name]
        given = np.ascontiguousarray(array, buffer.stored_dtype)
        assert given.shape == buffer.shape, f"{name}: {given.shape} for {buffer.shape}"
        self._device.upload(self._place(name), given)


def _form(buffer: Buffer) -> tuple[tuple[int, ...], np.dtype]:
    return buffer.shape, buffer.stored_dtype
