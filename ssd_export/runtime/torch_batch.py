"""State of one batch in the torch runner: caches, tokens, noise and numbers, in tensors that stay
where they are from batch to batch of a size, so that a captured step finds them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_export.cache.state import GroupState
from ssd_export.config import ModelConfig
from ssd_export.noise import GumbelNoise, ImageSeed
from ssd_export.policy.table import PolicyTable
from ssd_export.runtime.prompt_batch import PromptBatch

# Writes the noise of some steps to the first rows of float32 [grid width, images, codebook].
FillNoise = Callable[[Tensor, Sequence[ImageSeed], range], None]


@dataclass(frozen=True)
class BatchSize:
    """Numbers that decide the shapes of a batch. sorted_codes: how many of the codes top_k
    sorts.
    """

    num_images: int
    rows: int
    sorted_codes: int

    @classmethod
    def of(cls, batch: PromptBatch, config: ModelConfig) -> BatchSize:
        """The size of a batch of prompts."""
        most = max(sampling.top_k for sampling in batch.sampling)
        return cls(batch.num_images, len(batch.lengths), min(most, config.codebook_size))


class TorchBatch:
    """The tensors of a batch.

    lengths: int32 [B], of the prompts; step: int64 [1], the next decode step, counted by the step
    itself; tokens: int32 [image tokens, N]; noise: float32 [grid width, N, V]; logits: float32
    [B, V], of the newest token; sampling: cfg_scale, temperature, top_k [N]; states: of each layer
    and head group.
    """

    def __init__(
        self,
        size: BatchSize,
        config: ModelConfig,
        table: PolicyTable,
        dtype: torch.dtype,
        device: str,
        fill_noise: FillNoise | None = None,
    ) -> None:
        """Allocates the batch. Args: fill_noise: None computes it on the host."""
        self.size, self._grid = size, config.grid
        images, codes = size.num_images, config.codebook_size
        self.lengths = torch.zeros(size.rows, dtype=torch.int32, device=device)
        self.step = torch.ones(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(config.grid.num_tokens, images, dtype=torch.int32, device=device)
        self.noise = torch.zeros(config.grid.width, images, codes, device=device)
        self.logits = torch.zeros(size.rows, codes, device=device)
        self.sampling = {
            "cfg_scale": torch.zeros(images, device=device),
            "temperature": torch.zeros(images, device=device),
            "top_k": torch.zeros(images, dtype=torch.int64, device=device),
        }
        self.states = [
            [
                GroupState.empty(size.rows, group, config.head_dim, dtype, device, table.kv_dtype)
                for group in groups
            ]
            for groups in table.layers
        ]
        self._fill_noise = fill_noise or fill_on_host
        self._images: Sequence[ImageSeed] = ()
        self._grid_row: int | None = None
        self._host_step = 1  # what the device counts, as far as the host has queued steps

    def start(self, batch: PromptBatch) -> None:
        """Takes over the numbers of a batch of this size; caches are the prefill's to fill."""
        self.lengths.copy_(torch.from_numpy(batch.lengths))
        for name, values in batch.sampling_inputs().items():
            self.sampling[name].copy_(torch.from_numpy(values))
        for state in (state for layer in self.states for state in layer):
            state.key.zero_()  # what another batch left could be NaN, and 0 x NaN is NaN
            state.value.zero_()
        self.tokens.zero_()
        self.noise.zero_()  # which is what a greedy batch reads
        self._images = () if batch.is_greedy else batch.images
        self._grid_row = None
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Makes `step` the next one, and its grid row's noise what `noise` holds."""
        if step != self._host_step:
            self.step.fill_(step)
            self._host_step = step
        row = step // self._grid.width
        if self._images and row != self._grid_row:
            first = row * self._grid.width
            self._fill_noise(self.noise, self._images, range(first, first + self._grid.width))
        self._grid_row = row

    def passed(self) -> None:
        """The host's part of a step that was queued: the device has counted, or will."""
        self._host_step += 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the caches."""
        return sum(state.num_bytes for layer in self.states for state in layer)


def fill_on_host(noise: Tensor, images: Sequence[ImageSeed], steps: range) -> None:
    """Computes the noise with numpy and copies it."""
    noise.copy_(torch.from_numpy(GumbelNoise(images, noise.shape[2])(steps)))


def fill_on_gpu(noise: Tensor, images: Sequence[ImageSeed], steps: range) -> None:
    """The same bits by the Triton kernel; the host sends three words an image."""
    from ssd_export.kernels.gumbel_noise import fill_noise
    from ssd_export.kernels.noise_image import image_words

    fill_noise(noise, torch.from_numpy(image_words(images)).to(noise.device), steps)
