"""The demo model from nothing: tokenizer, image decoder, transformer, checkpoint. Resumes where it
was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ssd_export.demo.checkpoint_writer import write_demo_checkpoint
from ssd_export.demo.classes import write_class_checkpoint
from ssd_export.demo.train import Recipe, Training, log_line
from ssd_export.demo.train_decoder import DecoderRecipe, DecoderTraining
from ssd_export.errors import UserError
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.find import DEMO_CHECKPOINT
from ssd_export.model.load import load_image_decoder

GENERATION = {"cfg_scale": 1.0, "temperature": 0.8}
CLASS_GENERATION = {"cfg_scale": 1.0, "temperature": 0.9}
STEPS_BETWEEN_LINES = 20
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """Mean figures of the last steps: nats per image token, and levels (of 255) between decoded and
    true pixels.
    """

    token_loss: float
    decoder_levels: float


def train_demo(
    recipe: Recipe,
    decoder_recipe: DecoderRecipe,
    folder: Path,
    progress: Progress,
    device: str = "cpu",
) -> Outcome:
    """Trains both parts and writes `folder/checkpoint`; states and logs stay in the folder, so it
    can be resumed.

    Raises: UserError for a device that is not there.
    """
    _check_device(device)
    training = Training(recipe, folder, device)
    decoder = DecoderTraining(decoder_recipe, training.config, folder)
    levels = _run(decoder.run(), "image decoder", decoder_recipe.num_steps, folder, progress)
    token = _run(training.run(), "transformer", recipe.num_steps, folder, progress)
    write_demo_checkpoint(
        folder / "checkpoint",
        training.config,
        training.averaged_state(),
        decoder.decoder.state_dict(),
        training.tokenizer,
        GENERATION,
    )
    return Outcome(token.get("token", float("nan")), levels.get("levels", float("nan")))


def train_class_demo(
    recipe: Recipe, folder: Path, progress: Progress, device: str = "cpu"
) -> Outcome:
    """Trains the class-conditional transformer and writes `folder/checkpoint`, with the image
    decoder of the built-in demo model; resumed as train_demo.

    Raises: UserError for a device that is not there.
    """
    _check_device(device)
    training = Training(recipe, folder, device)
    token = _run(training.run(), "transformer", recipe.num_steps, folder, progress)
    write_class_checkpoint(
        folder / "checkpoint",
        training.config,
        training.averaged_state(),
        load_image_decoder(open_checkpoint(DEMO_CHECKPOINT)).state_dict(),
        CLASS_GENERATION,
    )
    return Outcome(token.get("token", float("nan")), float("nan"))


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device} is not available here; use cpu")


def _run(
    figures_of_steps: Iterator[dict[str, float]],
    stage: str,
    num_steps: int,
    folder: Path,
    progress: Progress,
) -> dict[str, float]:
    """Runs a training to its end; logs and returns means over STEPS_BETWEEN_LINES steps."""
    sums: dict[str, float] = {}
    means: dict[str, float] = {}
    for count, figures in enumerate(figures_of_steps, start=1):
        sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
        progress(stage, int(figures["step"]), num_steps)
        if count % STEPS_BETWEEN_LINES == 0 or figures["step"] == num_steps:
            since = (count - 1) % STEPS_BETWEEN_LINES + 1
            means = {name: total / since for name, total in sums.items()}
            means |= {"step": figures["step"], "seconds": figures["seconds"]}
            log_line(folder, stage, means)
            sums = {}
    return means
