"""What a Janus-Pro checkpoint is, in numbers: the language model, the image vocabulary, the
picture.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GRID = 24
NUM_IMAGE_TOKENS = GRID * GRID
NEIGHBOURHOOD = 48  # newest image tokens, the asking one included: what a spatial head looks at
TAU = 0.2  # a head with more of its attention outside is semantic; the published maps' threshold


@dataclass(frozen=True)
class VQConfig:
    """Shape of the VQ-16 image decoder (codes of the 24 x 24 grid -> pixels).

    latent_channels: width of the decoder's input, after the 1x1 convolution from codebook_dim.
    base_channels, channel_multipliers: widths from the highest to the lowest resolution.
    num_res_blocks: residual blocks a level, the decoder has one more.
    """

    latent_channels: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    out_channels: int = 3


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that every graph, cache and picture is built from. Immutable; the same on every
    backend.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int
    codebook_size: int
    codebook_dim: int
    vq: VQConfig
    image_size: int

    @property
    def query_group_size(self) -> int:
        """Query heads that share one KV head (1: multi-head attention)."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
