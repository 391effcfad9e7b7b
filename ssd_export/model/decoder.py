"""The part of a model that generates images: a Llama with attention given from outside, and
image-token layers.

Parameter names are the checkpoint's canonical names (`checkpoint.py`): a state dict loads with
strict=True. float32 islands at every model dtype: RMSNorm and the RoPE angles (softmax is the
caller's `attend`).

Source: transformers' modeling_llama.py and modeling_janus.py, whose arithmetic is followed
operation for operation so that float32 tokens are equal. Ours has no cache and no mask: both belong
to `attend`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_export.config import Grid, ModelConfig

# attend(layer, query [B, Hq, T, D], key [B, H, T, D], value [B, H, T, D]) -> [B, Hq, T, D]
# RoPE is already in query and key. Query head i belongs to KV head i // query_group_size.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean and the root in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x [..., hidden] in float32; the dtype of x is kept."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Rope(nn.Module):
    """(cos, sin) of positions [B, T], each [B, 1, T, D] in the wanted dtype; the angles in
    float32.

    frequencies: float32 [1, D/2] of the position or, with a grid, [2, D/2] of an image token's grid
    row and column, each of which turns half of the pairs. With a grid cos and sin of the condition
    are 0: its queries and keys become zero.
    """

    def __init__(self, head_dim: int, theta: float, grid: Grid | None = None) -> None:
        super().__init__()
        size = head_dim if grid is None else head_dim // 2
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
        own = 1.0 / (theta**exponents)
        # a plain attribute: a buffer would follow the model to fp16, and to the meta device
        self.frequencies = own[None] if grid is None else torch.block_diag(own, own)
        self.grid = grid
        self._copies: dict[torch.device, Tensor] = {}

    def forward(
        self,
        positions: Tensor,
        dtype: torch.dtype,
        prompt_length: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, 1, T, head_dim] each, of positions int [B, T].

        Args: prompt_length: of all rows, or int [B]; a grid needs it.
        """
        frequencies = self._frequencies_on(positions.device)
        if self.grid is None:
            angles = positions[:, None, :, None].to(torch.float32) * frequencies[0]
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos().to(dtype), angles.sin().to(dtype)
        if prompt_length is None:
            raise ValueError("positions on a grid begin after the prompt: give prompt_length")
        ends = prompt_length[:, None] if isinstance(prompt_length, Tensor) else prompt_length
        index = (positions - ends)[:, None, :, None]
        row, column = (
            part.to(torch.float32) for part in (index // self.grid.width, index % self.grid.width)
        )
        angles = row * frequencies[0] + column * frequencies[1]
        angles, turned = torch.cat((angles, angles), dim=-1), index >= 0
        return (angles.cos() * turned).to(dtype), (angles.sin() * turned).to(dtype)

    def _frequencies_on(self, device: torch.device) -> Tensor:
        """Sent to a device once: a copy from the host in every step would wait, and no CUDA graph
        takes it.
        """
        if self.frequencies.device == device:
            return self.frequencies
        if device not in self._copies:
            self._copies[device] = self.frequencies.to(device)
        return self._copies[device]


def rope_of(config: ModelConfig) -> Rope:
    """The rotation of a model's queries and keys."""
    grid = config.grid if config.rope_axes == 2 else None
    return Rope(config.head_dim, config.rope_theta, grid)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D] turned by its position; the first and the second half of D are the two
    coordinates.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class SelfAttention(nn.Module):
    """Projections and RoPE around the attention that is given from outside."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size, kv_size = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Projects hidden [B, T, hidden], rotates, and leaves attention to `attend`."""
        query = rotate(self._heads(self.q_proj(hidden)), cos, sin)
        key = rotate(self._heads(self.k_proj(hidden)), cos, sin)
        attended = attend(self.layer, query, key, self._heads(self.v_proj(hidden)))
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, H*D] -> [B, H, T, D]


class MLP(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, T, hidden] to [B, T, hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind its RMSNorm and beside its residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Adds attention and MLP to hidden [B, T, hidden]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """The Llama: hidden states in, hidden states after the final RMSNorm out.

    text_embedding: also own `embed_tokens` [vocab_size, condition_dim]; off by default, a runtime
    reads single rows of that table from the file and never holds it.
    """

    def __init__(self, config: ModelConfig, text_embedding: bool = False) -> None:
        super().__init__()
        if text_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.condition_dim)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = rope_of(config)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        prompt_length: Tensor | int | None = None,
    ) -> Tensor:
        """Runs all layers and the final norm: hidden [B, T, hidden_size], positions integer [B, T],
        prompt_length as Rope has it.
        """
        cos, sin = self.rope(positions, hidden.dtype, prompt_length)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attend)
        return self.norm(hidden)


class Aligner(nn.Module):
    """Codebook embedding [..., codebook_dim] -> hidden state [..., hidden_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.codebook_dim, config.hidden_size)
        self.hidden_layers = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size)])

    def forward(self, x: Tensor) -> Tensor:
        """Maps codebook entries [..., codebook_dim] to embeddings [..., hidden]."""
        return self.hidden_layers[0](F.gelu(self.fc1(x)))


class CaptionProjection(nn.Module):
    """Caption embedding [..., caption_dim] -> hidden state [..., hidden_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps caption embeddings [..., caption_dim] to hidden states [..., hidden_size]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GenerationHead(nn.Module):
    """Hidden state [..., hidden_size] -> logits over the image vocabulary [..., codebook_size]: an
    MLP where the model has an aligner, else one matrix without a bias.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.has_aligner = config.has_aligner
        if config.has_aligner:
            self.proj_out = nn.Linear(config.hidden_size, config.hidden_size)
        self.vision_head = nn.Linear(
            config.hidden_size, config.codebook_size, bias=config.has_aligner
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps final hidden states [..., hidden_size] to logits [..., codebook_size]."""
        if self.has_aligner:
            hidden = F.gelu(self.proj_out(hidden))
        return self.vision_head(hidden)


class ImageTokenModel(nn.Module):
    """Everything between token ids and image logits; state_dict keys are the canonical names."""

    def __init__(self, config: ModelConfig, text_embedding: bool = False) -> None:
        super().__init__()
        self.config = config
        self.language_model = Decoder(config, text_embedding)
        width = config.codebook_dim if config.has_aligner else config.hidden_size
        self.generation_embeddings = nn.Embedding(config.codebook_size, width)
        if config.has_aligner:
            self.generation_aligner = Aligner(config)
        if config.caption_dim:
            self.caption_projection = CaptionProjection(config)
        self.generation_head = GenerationHead(config)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        prompt_length: Tensor | int | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, hidden_size]; `image_logits` takes those that are wanted.

        Args: prompt_length: of all rows, or int [B]; what RoPE on a grid counts from.
        """
        return self.language_model(hidden, positions, attend, prompt_length)

    def embed_text_tokens(self, ids: Tensor) -> Tensor:
        """Prompt ids [B, T] -> [B, T, condition_dim]; needs text_embedding=True."""
        return self.language_model.embed_tokens(ids)

    def condition(self, embeds: Tensor) -> Tensor:
        """The condition's embeddings [..., condition_dim] -> hidden states [..., hidden_size]."""
        return self.caption_projection(embeds) if self.config.caption_dim else embeds

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens [...] -> [..., hidden_size], the next input of the decoder."""
        embedded = self.generation_embeddings(tokens)
        return self.generation_aligner(embedded) if self.config.has_aligner else embedded

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., hidden_size] -> logits [..., codebook_size], before
        guidance.
        """
        return self.generation_head(hidden)
