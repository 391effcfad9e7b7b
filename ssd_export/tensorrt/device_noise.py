"""The noise of a batch on the GPU: its kernel writes a grid row's when the row is reached, and that
of a window for each pass of lookahead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from ssd_export.config import ModelConfig
from ssd_export.kernels.noise_image import (
    ENTRY,
    NUM_WARPS,
    PTX_FILE,
    image_words,
    noise_programs,
)
from ssd_export.noise import ImageSeed
from ssd_export.tensorrt.cuda_device import CudaDevice, Kernel

ALIGNMENT = 16  # bytes, of the kernel's addresses
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
        _launch(self._device, self._kernel, width, (self._address, self._images, *numbers))

    def windows(self) -> WindowDeviceNoise:
        """Noise of windows by the same kernel; closed before this."""
        return WindowDeviceNoise(self._device, self._config, self._kernel)

    def close(self) -> None:
        """Unloads the kernel and frees the memory."""
        with ExitStack() as both:
            both.callback(self._device.unload_kernel, self._kernel)
            both.callback(self._free)

    def _free(self) -> None:
        if self._images:
            self._device.free(self._images)
        self._images, self._num_images = 0, 0


class WindowDeviceNoise:
    """Writes float32 [images, window, codebook] at an address, each image's from its own step on:
    the same numbers, by a launch for each image.
    """

    def __init__(self, device: CudaDevice, config: ModelConfig, kernel: Kernel) -> None:
        self._device, self._codes, self._kernel = device, config.codebook_size, kernel
        self._images, self._room, self._num_images = 0, 0, 0

    def start(self, images: Sequence[ImageSeed]) -> None:
        """Takes a batch; without images nothing is written."""
        self._num_images = len(images)
        if not images:
            return
        words = np.zeros((len(images), ALIGNMENT // 4), np.int32)  # each image's begin aligned
        words[:, :3] = image_words(images)
        if self._room < words.nbytes:
            self.close()
            self._images, self._room = self._device.allocate(words.nbytes), words.nbytes
        self._device.upload(self._images, words)

    def write(self, first: np.ndarray, width: int, address: int) -> None:
        """Queues the noise of `width` steps from each image's first one on."""
        size = 4 * width * self._codes
        if self._num_images > 1 and size % ALIGNMENT:
            raise ValueError(f"{width} steps of {self._codes} codes are no multiple of {ALIGNMENT}")
        for image, step in enumerate(first.tolist()[: self._num_images]):
            words, place = self._images + ALIGNMENT * image, address + size * image
            _launch(self._device, self._kernel, width, (place, words, step, 1, self._codes))

    def close(self) -> None:
        """Frees the memory."""
        if self._images:
            self._device.free(self._images)
        self._images = self._room = 0


def _launch(
    device: CudaDevice, kernel: Kernel, num_steps: int, arguments: tuple[int, int, int, int, int]
) -> None:
    """Queues the kernel. arguments: address of the noise and of the images' words, first step,
    number of images, codebook size.
    """
    *_, num_images, codes = arguments
    device.launch_kernel(
        kernel,
        (num_steps * num_images, noise_programs(codes)),
        32 * NUM_WARPS,
        (*arguments, 0, 0),
        ARGUMENT_TYPES,
    )
