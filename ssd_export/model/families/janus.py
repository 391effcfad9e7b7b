"""Janus: what every Janus-Pro checkpoint has in common, and the published models in numbers."""

from __future__ import annotations

from ssd_export.config import Grid, ModelConfig, VQConfig

NAME = "janus"
GRID = Grid(24, 24)
ROWS_PER_IMAGE = 2  # the conditional row and, for classifier-free guidance, the unconditional one

VQ_16 = VQConfig(
    latent_channels=256, base_channels=128, channel_multipliers=(1, 1, 2, 2, 4), num_res_blocks=2
)


def _janus_pro(
    num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        max_positions=16_384,
        codebook_size=16_384,
        codebook_dim=8,
        vq=VQ_16,
        family=NAME,
        grid=GRID,
        rows_per_image=ROWS_PER_IMAGE,
    )


PUBLISHED = {
    "janus-pro-1b": _janus_pro(24, 2048, 16, 5632),
    "janus-pro-7b": _janus_pro(30, 4096, 32, 11008),
}
