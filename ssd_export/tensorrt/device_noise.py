"""The noise of a batch on the GPU: its kernel writes a grid row's when the row is reached."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack

from ssd_export.config import ModelConfig
from ssd_export.kernels.noise_image import (
    ENTRY,
    NUM_WARPS,
    PTX_FILE,
    image_words,
    noise_programs,
)
from ssd_export.noise import ImageSeed
from ssd_export.tensorrt.cuda_device import CudaDevice

ARGUMENT_TYPES = (
    *[ctypes.c_void_p] * 2,  # noise, images
    *[ctypes.c_int32] * 3,  # first step, number of images, codebook size
    *[ctypes.c_void_p] * 2,  # Triton's scratch memory, which the kernel does not use
)


class DeviceNoise:
    """Writes float32 [grid width, images, codebook] at an address, in the order of the stream: step
    s reads row s mod grid width.
    """

    def __init__(self, device: CudaDevice, config: ModelConfig) -> None:
        self._device, self._config = device, config
        self._kernel = device.load_kernel(PTX_FILE.read_bytes(), ENTRY)
        self._address, self._images = 0, 0  # of the noise and of the batch's images, 0: none
        self._num_images = 0
        self._row: int | None = None

    def start(self, images: Sequence[ImageSeed], address: int) -> None:
        """Takes a batch, whose noise goes to this address."""
        words = image_words(images)
        if self._num_images != len(images):
            self._free()
            self._images = self._device.allocate(words.nbytes)
            self._num_images = len(images)
        self._device.upload(self._images, words)
        self._address, self._row = address, None

    def reach(self, step: int) -> None:
        """Queues the noise of the step's grid row, where that of another one is there."""
        width = self._config.grid.width
        if step // width == self._row:
            return
        self._row = step // width
        codes = self._config.codebook_size
        numbers = (step // width * width, self._num_images, codes)
        self._device.launch_kernel(
            self._kernel,
            (width * self._num_images, noise_programs(codes)),
            32 * NUM_WARPS,
            (self._address, self._images, *numbers, 0, 0),
            ARGUMENT_TYPES,
        )

    def close(self) -> None:
        """Unloads the kernel and frees the memory."""
        with ExitStack() as both:
            both.callback(self._device.unload_kernel, self._kernel)
            both.callback(self._free)

    def _free(self) -> None:
        if self._images:
            self._device.free(self._images)
        self._images, self._num_images = 0, 0
