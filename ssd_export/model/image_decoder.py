"""The VQ-16 decoder: the grid's codes of the image vocabulary -> pixels.

Parameter names are the checkpoint's canonical names (`vqmodel.*`). GroupNorm and softmax are
computed in float32 at every dtype. Source: transformers' modeling_janus.py (JanusVQVAE.decode),
operation for operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_export.config import NUM_GROUPS, Grid, ModelConfig, VQConfig

EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """GroupNorm(32) with its sums in float32 (an fp16 graph would sum thousands of pixels in
    fp16).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(NUM_GROUPS, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x [N, C, H, W] in float32; the dtype of x is kept."""
        wide = F.group_norm(x.float(), NUM_GROUPS, self.weight.float(), self.bias.float(), EPS)
        return wide.to(x.dtype)


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * torch.sigmoid(x)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Two normed convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm2 = GroupNorm(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, kernel_size=1)
        self.has_shortcut = channels_in != channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [N, channels_in, H, W] to [N, channels, H, W]."""
        changed = self.conv1(swish(self.norm1(x)))
        changed = self.conv2(swish(self.norm2(changed)))
        return (self.nin_shortcut(x) if self.has_shortcut else x) + changed


class AttentionBlock(nn.Module):
    """Single-head attention among all places of the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)
        self.scale = channels**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Adds single-head attention over all places to x [N, C, H, W]."""
        # x: [N, C, h, w]; weights: [N, h*w of the query, h*w of the key]
        normed = self.norm(x)
        query, key, value = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))
        weights = torch.bmm(query.transpose(1, 2), key) * self.scale
        weights = torch.softmax(weights, dim=2, dtype=torch.float32).to(x.dtype)
        attended = torch.bmm(value, weights.transpose(1, 2))
        return x + self.proj_out(attended.unflatten(2, x.shape[2:]))


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [N, C, H, W] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Upsample(nn.Module):
    """Nearest doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [N, C, H, W] to [N, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where wanted, then twice the
    size.
    """

    def __init__(
        self, channels_in: int, channels: int, num_blocks: int, *, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(*pair) for pair in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(
            AttentionBlock(channels) for _ in range(num_blocks if attention else 0)
        )
        if upsample:
            self.upsample = Upsample(channels)
        self.has_upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [N, channels_in, H, W] to [N, channels, H, W], twice as high and wide with an
        upsampler.
        """
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(x) if self.has_upsample else x


class PixelDecoder(nn.Module):
    """Latents [N, latent_channels, height, width] -> pixels [N, out_channels, ...]."""

    def __init__(self, vq: VQConfig) -> None:
        super().__init__()
        widths = [vq.base_channels * multiplier for multiplier in reversed(vq.channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = conv3x3(vq.latent_channels, widths[0])
        self.mid = MiddleBlock(widths[0])
        self.up = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                vq.num_res_blocks + 1,
                attention=i == 0,
                upsample=i < last,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = conv3x3(widths[-1], vq.out_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """Decodes latents to pixels of about -1..1, not clipped."""
        x = self.mid(self.conv_in(latents))
        for level in self.up:
            x = level(x)
        return self.conv_out(swish(self.norm_out(x)))


class Codebook(nn.Module):
    """Codes [N, grid tokens] -> unit vectors [N, codebook_dim, height, width]."""

    def __init__(self, size: int, dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.embedding = nn.Embedding(size, dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Looks codes up, integer [N, grid tokens]; entries are normalized in float32."""
        entries = self.embedding(codes)
        entries = F.normalize(entries.float(), p=2, dim=-1).to(entries.dtype)
        return (
            entries.unflatten(1, (self.grid.height, self.grid.width))
            .permute(0, 3, 1, 2)
            .contiguous()
        )


class VQModel(nn.Module):
    """Codes of the grid to pixels in -1..1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.quantize = Codebook(config.codebook_size, config.codebook_dim, config.grid)
        self.post_quant_conv = nn.Conv2d(
            config.codebook_dim, config.vq.latent_channels, kernel_size=1
        )
        self.decoder = PixelDecoder(config.vq)

    def forward(self, codes: Tensor) -> Tensor:
        """Decodes codes, integer [N, grid tokens], to pixels [N, 3, height, width]."""
        return self.decoder(self.post_quant_conv(self.quantize(codes)))


class ImageDecoder(nn.Module):
    """Codes (integer [N, grid tokens], row by row) -> pixels [N, 3, height, width], about -1..1,
    not clipped.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vqmodel = VQModel(config)

    def forward(self, codes: Tensor) -> Tensor:
        """Decodes codes, integer [N, grid tokens], to pixels [N, 3, height, width]."""
        return self.vqmodel(codes)
