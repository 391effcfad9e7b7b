"""Ranges of the image decoder's convolutions, which its int8 form rounds to.

They come from the float32 decoder in torch over images of the model. Random codes would not do:
plain areas and outlines of real images reach further than they.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.os_errors import os_error

# Of the demo model's scenes 8 leave others at 37 dB, 20 leave them all above 48.
LEAST_IMAGES, ENOUGH_IMAGES, MAX_IMAGES = 20, 32, 96


@dataclass
class Range:
    """Numbers that a convolution has seen.

    Attributes: low, high, mean: of each input channel; out_low, out_high: of each output channel.
    """

    low: np.ndarray = field(default_factory=lambda: np.zeros(1))
    high: np.ndarray = field(default_factory=lambda: np.zeros(1))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(1))
    out_low: np.ndarray = field(default_factory=lambda: np.zeros(1))
    out_high: np.ndarray = field(default_factory=lambda: np.zeros(1))
    count: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes an input [1, C, H, W] and its output in."""
        places = (0, 2, 3)
        self.low = np.minimum(self.low, x.amin(dim=places).numpy())
        self.high = np.maximum(self.high, x.amax(dim=places).numpy())
        mean = x.mean(dim=places, dtype=torch.float64).numpy()
        self.mean = (self.mean * self.count + mean) / (self.count + 1)
        self.out_low = np.minimum(self.out_low, y.amin(dim=places).numpy())
        self.out_high = np.maximum(self.out_high, y.amax(dim=places).numpy())
        self.count += 1


@torch.inference_mode()
def measure_ranges(
    decoder: ImageDecoder, grids: np.ndarray, progress: Callable[[], None] = lambda: None
) -> dict[str, Range]:
    """The range of every convolution, by its name in the checkpoint, over grids int [n, tokens]."""
    ranges: dict[str, Range] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: ranges.setdefault(name, Range()).add(
            inputs[0], output
        )

    handles = [
        module.register_forward_hook(note(name))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        for grid in grids:
            decoder(torch.from_numpy(grid[None].astype(np.int64)))
            progress()
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def calibration_grids(config: ModelConfig, samples: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grids to calibrate with and held-out ones, the last quarter; int [n, image tokens] each.

    Args: samples: a file of `generate --save-tokens`.
    Raises: UserError for a file that holds no grids of this model, or too few.
    """
    grids = _read_samples(samples, config)[:MAX_IMAGES]
    held_out = len(grids) // 4
    return grids[:-held_out], grids[-held_out:]


def _read_samples(path: Path, config: ModelConfig) -> np.ndarray:
    way_out = "give a file that `ssd-export generate --save-tokens FILE.npy` wrote"
    try:
        grids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise os_error(error, "read", path, way_out) from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} holds no array ({error}); {way_out}") from None
    wanted = config.grid.num_tokens
    if not isinstance(grids, np.ndarray) or grids.ndim != 2 or grids.shape[1] != wanted:
        raise UserError(f"{path} holds no grids of {wanted} tokens; {way_out}")
    if not np.issubdtype(grids.dtype, np.integer):
        raise UserError(f"{path} holds {grids.dtype} and no codes; {way_out}")
    if len(grids) < LEAST_IMAGES:
        raise UserError(
            f"{path} holds {len(grids)} images, and what fewer than {LEAST_IMAGES} have shown clips"
            f" others; generate {ENOUGH_IMAGES}"
        )
    if grids.min() < 0 or grids.max() >= config.codebook_size:
        raise UserError(f"{path} holds codes outside 0 .. {config.codebook_size - 1}; {way_out}")
    return grids
