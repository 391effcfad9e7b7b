"""An untrained class-conditional demo model, as the recipe writes a trained one."""

from __future__ import annotations

from pathlib import Path

import torch

from ssd_export.demo.classes import class_demo_config, write_class_checkpoint
from ssd_export.demo.recipe import CLASS_GENERATION
from ssd_export.demo.train import class_recipe, demo_config, initialize
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.find import DEMO_CHECKPOINT
from ssd_export.model.load import load_image_decoder


def write_untrained(folder: Path) -> Path:
    """Writes a checkpoint of the class-conditional demo's size with random weights."""
    config = class_demo_config(demo_config(class_recipe(), 1))
    torch.manual_seed(0)
    model = ImageTokenModel(config, text_embedding=True)
    initialize(model, config.num_layers)
    decoder = load_image_decoder(open_checkpoint(DEMO_CHECKPOINT)).state_dict()
    write_class_checkpoint(folder, config, model.state_dict(), decoder, CLASS_GENERATION)
    return folder
