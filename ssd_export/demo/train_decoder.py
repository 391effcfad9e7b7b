"""Trains the demo model's image decoder: codes of true scenes -> their images. Resumable, the
same for a seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssd_export.config import ModelConfig
from ssd_export.demo import codes
from ssd_export.demo.scenes import COLORS, GROUNDS, random_scene, render
from ssd_export.model.image_decoder import ImageDecoder


@dataclass(frozen=True)
class DecoderRecipe:
    """Numbers of the training of the image decoder."""

    num_steps: int = 1600
    batch_size: int = 8
    rate: float = 2e-3
    warmup_steps: int = 40
    seed: int = 0


def initial_codebook(dim: int) -> Tensor:
    """Rows [V, dim] that already tell paints and patterns apart: color in three numbers, pattern
    in the rest.
    """
    pattern, paint = codes.factors()
    colors = np.array([*GROUNDS.values(), *COLORS.values()], np.float32) / 127.5 - 1
    shapes = codes.patterns() - codes.patterns().mean(axis=0)
    axes = np.linalg.svd(shapes, full_matrices=False)[2][: dim - 3]
    components = shapes @ axes.T
    components /= components.std(axis=0)
    borders = np.repeat(components[:1], codes.LAST_COLUMN, axis=0)  # plain ground too
    components = np.concatenate([components, borders])
    return torch.from_numpy(
        np.concatenate([colors[paint], 0.5 * components[pattern]], axis=1).astype(np.float32)
    )


class DecoderTraining:
    """State of a run in a folder: `decoder.pt`, written every few minutes and at the end."""

    def __init__(self, recipe: DecoderRecipe, config: ModelConfig, folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder = recipe, folder
        self.decoder = ImageDecoder(config)
        with torch.no_grad():
            self.decoder.vqmodel.quantize.embedding.weight.copy_(
                initial_codebook(config.codebook_dim)
            )
        self.adam = torch.optim.AdamW(
            self.decoder.parameters(), betas=(0.9, 0.98), weight_decay=0.0
        )
        self.step = 0
        self.seconds = 0.0
        if self._path.exists():
            self._load()

    @property
    def _path(self) -> Path:
        return self.folder / "decoder.pt"

    def run(self, seconds_between_saves: float = 120) -> Iterator[dict[str, float]]:
        """Trains to the last step; yields step, loss (mean absolute error in levels of 255) and
        seconds so far.
        """
        saved = time.monotonic()
        while self.step < self.recipe.num_steps:
            began = time.monotonic()
            levels = self._one_step()
            self.seconds += time.monotonic() - began
            if time.monotonic() - saved > seconds_between_saves:
                self.save()
                saved = time.monotonic()
            yield {"step": self.step, "levels": levels, "seconds": self.seconds}
        self.save()

    def _one_step(self) -> float:
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, self.step])
        scenes = [random_scene(rng, composed=False) for _ in range(recipe.batch_size)]
        grids = torch.from_numpy(np.stack([codes.encode_scene(scene) for scene in scenes]))
        wanted = (
            torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
            / 127.5
            - 1
        )
        error = self.decoder(grids) - wanted
        (error.abs().mean() + error.square().mean()).backward()
        done = self.step / recipe.num_steps
        warm = min(1.0, (self.step + 1) / recipe.warmup_steps)
        self.adam.param_groups[0]["lr"] = (
            recipe.rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        )
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.adam.step()
        self.decoder.zero_grad(set_to_none=True)
        self.step += 1
        return float(error.detach().abs().mean()) * 127.5

    def save(self) -> None:
        """Writes the state from which a run goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "decoder": self.decoder.state_dict(),
            "adam": self.adam.state_dict(),
        }
        torch.save(state, self._path.with_suffix(".tmp"))
        self._path.with_suffix(".tmp").replace(self._path)

    def _load(self) -> None:
        state = torch.load(self._path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.decoder.load_state_dict(state["decoder"])
        self.adam.load_state_dict(state["adam"])
