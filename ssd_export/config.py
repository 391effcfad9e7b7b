"""Numbers that define a model: the language model, the image vocabulary, the grid of image tokens.

What a family of models has in common stands in its file under model/families/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# The table that prompts take their rows from: text tokens, classes, or the learned null caption.
EMBED_TOKENS = "language_model.embed_tokens.weight"
NUM_GROUPS = 32  # of the image decoder's group normalizations
ONLINE_TAU = 0.1  # the same by the first tokens of an image, which have less outside (HeadKV)
TAU = 0.2  # a head with more of its attention outside is semantic; the published maps' threshold

MAX_GRID_SIDE = 256  # image tokens; 24 in Janus, 32 and 64 in others


@dataclass(frozen=True)
class Grid:
    """The image tokens of one image, generated row by row from the upper left."""

    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Image tokens of one image."""
        return self.height * self.width

    @property
    def neighborhood(self) -> int:
        """Newest image tokens, the asking one included: what a spatial head looks at (two rows)."""
        return 2 * self.width

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


@dataclass(frozen=True)
class VQConfig:
    """Shape of the VQ-16 image decoder (codes of the grid -> pixels).

    latent_channels: width of the decoder's input, after the 1x1 convolution from codebook_dim.
    base_channels, channel_multipliers: widths from the highest to the lowest resolution.
    num_res_blocks: residual blocks a level, the decoder has one more.
    """

    latent_channels: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    out_channels: int = 3

    @property
    def pixels_per_token(self) -> int:
        """Width and height of the patch that one image token becomes."""
        return 1 << (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that every graph, cache and image is built from. Immutable; the same on every
    backend.

    vocab_size: rows of the table of condition embeddings (text tokens, classes).
    family: a name in model/families/; rows_per_image: of the batch, 2 with classifier-free
    guidance (the conditional and the unconditional row), else 1.
    rope_axes: 1 turns every token by its position; 2 turns an image token by its grid row and
    column, and takes queries and keys of the condition as zero.
    has_aligner: image tokens enter through entries of codebook_dim and an MLP, and leave through
    another; without it both are plain tables of hidden_size.
    prompt_template: a name among the family's; "" where it has one alone.
    caption_dim: width of the condition's embeddings where an MLP brings them to hidden_size; 0
    where they have it.
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
    family: str
    grid: Grid
    rows_per_image: int
    rope_axes: int = 1
    has_aligner: bool = True
    caption_dim: int = 0
    prompt_template: str = ""

    @property
    def condition_dim(self) -> int:
        """Width of the embeddings that prefill takes."""
        return self.caption_dim or self.hidden_size

    @property
    def query_group_size(self) -> int:
        """Query heads that share one KV head (1: multi-head attention)."""
        return self.num_heads // self.num_kv_heads

    @property
    def image_height(self) -> int:
        """Pixels."""
        return self.grid.height * self.vq.pixels_per_token

    @property
    def image_width(self) -> int:
        """Pixels."""
        return self.grid.width * self.vq.pixels_per_token

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain data for JSON."""
        return asdict(self)
