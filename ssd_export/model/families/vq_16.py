"""The image tokenizer of 16 x 16 pixels a token that several families publish: names of its
decoder's tensors, and its widths.

Source: LlamaGen's VQ-16, which Janus took over.
"""

from __future__ import annotations

import re
from pathlib import Path

from ssd_export.config import NUM_GROUPS, VQConfig
from ssd_export.errors import UserError
from ssd_export.model.families.family import Shapes

VQ_16 = VQConfig(
    latent_channels=256, base_channels=128, channel_multipliers=(1, 1, 2, 2, 4), num_res_blocks=2
)
# From the names as published, "vqmodel." in front, to the canonical ones.
FROM_BLOCKS = [
    (re.compile(r"^vqmodel\.decoder\.mid\.0\."), "vqmodel.decoder.mid.block_1."),
    (re.compile(r"^vqmodel\.decoder\.mid\.1\."), "vqmodel.decoder.mid.attn_1."),
    (re.compile(r"^vqmodel\.decoder\.mid\.2\."), "vqmodel.decoder.mid.block_2."),
    (re.compile(r"^vqmodel\.decoder\.conv_blocks\.(\d+)\.res\."), r"vqmodel.decoder.up.\1.block."),
    (re.compile(r"^vqmodel\.decoder\.conv_blocks\."), "vqmodel.decoder.up."),
]


def vq_config_from_shapes(path: Path, shapes: Shapes, title: str, what: str) -> VQConfig:
    """The decoder's widths. Args: path: of config.json; title: of the family; what: the name of
    what is missing.

    Raises: UserError where tensors of the decoder are missing.
    """
    try:
        levels, blocks = 0, 0
        while f"vqmodel.decoder.up.{levels}.block.0.conv1.weight" in shapes:
            levels += 1
        while f"vqmodel.decoder.up.0.block.{blocks}.conv1.weight" in shapes:
            blocks += 1
        widths = [
            shapes[f"vqmodel.decoder.up.{level}.block.0.conv1.weight"][0] for level in range(levels)
        ]
        vq = VQConfig(
            latent_channels=shapes["vqmodel.post_quant_conv.weight"][0],
            base_channels=widths[-1],
            channel_multipliers=tuple(max(width // widths[-1], 1) for width in reversed(widths)),
            num_res_blocks=blocks - 1,
            out_channels=shapes["vqmodel.decoder.conv_out.weight"][0],
        )
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{path.parent} lacks the image decoder ({what}, {error}): give a {title} checkpoint"
        ) from None
    check_widths(path, vq, title)
    return vq


def check_widths(path: Path, vq: VQConfig, title: str) -> None:
    """Raises UserError for widths that the decoder's normalization does not divide."""
    widths = [vq.base_channels * multiplier for multiplier in vq.channel_multipliers]
    if any(width % NUM_GROUPS for width in widths):
        raise UserError(
            f"{path.parent}: the image decoder's widths {widths} are not multiples of"
            f" {NUM_GROUPS}: give a {title} checkpoint"
        )
