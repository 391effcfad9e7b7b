"""The torch modules of a checkpoint with its weights, one copy in memory."""

from __future__ import annotations

import torch

from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.decoder import ImageTokenModel
from ssd_export.model.image_decoder import ImageDecoder
from ssd_export.model.uninitialized import shapes_alone

SMALL = 500_000_000  # parameters; 2 GB in float32


def load_model(
    checkpoint: Checkpoint,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    text_embedding: bool = True,
) -> ImageTokenModel:
    """The language model and the image-token layers, all in one dtype.

    Args: dtype: None makes a small model float32, which a CPU computes several times faster than
    fp16, and leaves a large one in its own. text_embedding: without it the table of text tokens,
    which only prompts need, stays in the file.
    """
    with shapes_alone():
        model = ImageTokenModel(checkpoint.config, text_embedding)
    names = list(model.state_dict())
    own = checkpoint.tensor(next(name for name in names if name.endswith("q_proj.weight"))).dtype
    dtype = dtype or (torch.float32 if is_small(model) else own)
    model.load_state_dict(
        {name: checkpoint.tensor(name, dtype).to(device) for name in names}, assign=True
    )
    return model.eval().requires_grad_(False)


def load_image_decoder(
    checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageDecoder:
    """The image decoder, from codes to pixels."""
    with shapes_alone():
        decoder = ImageDecoder(checkpoint.config)
    names = list(decoder.state_dict())
    decoder.load_state_dict(
        {name: checkpoint.tensor(name, dtype).to(device) for name in names}, assign=True
    )
    return decoder.eval().requires_grad_(False)


def is_small(model: ImageTokenModel) -> bool:
    """Whether a CPU passes through it in a fraction of a second."""
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL
