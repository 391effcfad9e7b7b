"""The tensors of a bundle's weights file (weights.py): names, shapes, and how each is made from a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ssd_export.config import EMBED_TOKENS
from ssd_export.export.quantize import HEAD_MATRICES, QuantizedMatrix, scale_name
from ssd_export.export.weights import Weight
from ssd_export.model.checkpoint import PROJECTION, Checkpoint, permute_heads
from ssd_export.model.quantization import (
    STORED_DTYPES,
    choose_scheme,
    scale_shape,
    stored_shape,
)
from ssd_export.policy.table import PolicyTable

LINEAR = ("generation_aligner.", "generation_head.", "caption_projection.")


def plan_weights(
    checkpoint: Checkpoint,
    table: PolicyTable,
    dtype: torch.dtype,
    quantized: str = "none",
    head_quantized: str = "none",
) -> list[Weight]:
    """Every tensor of the weights file, in the order in which it is written.

    The language model and the image-token layers are in `dtype`; so is the image decoder, but for
    its norms.
    quantized: none, int8, int4 or fp8, for the matrices of the language model's layers;
    head_quantized: for those of the generation head and the aligner (export/quantize.py).
    """
    source = _Source(checkpoint, table, dtype)
    weights: list[Weight] = []
    for layer in range(checkpoint.config.num_layers):
        weights += source.layer(layer, quantized)
    weights.append(source.plain("language_model.norm.weight"))
    weights.append(source.plain("generation_embeddings.weight"))
    weights += source.linear_layers(head_quantized)
    decoder = [name for name in checkpoint.names() if name.startswith("vqmodel.")]
    return [*weights, *map(source.plain, decoder), source.plain(EMBED_TOKENS)]


@dataclass(frozen=True)
class _Source:
    """A checkpoint whose tensors are read in a dtype, their heads in the order of a table."""

    checkpoint: Checkpoint
    table: PolicyTable
    dtype: torch.dtype

    def layer(self, layer: int, format: str) -> list[Weight]:
        """The tensors of a layer of the language model, its matrices in a format."""
        source = f"language_model.layers.{layer}"
        attention = [f"{source}.self_attn.{part}_proj.weight" for part in "qkv"]
        gate_up = [f"{source}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        return [
            self.plain(f"{source}.input_layernorm.weight"),
            *self.matrix(format, f"layers.{layer}.qkv", *attention),
            *self.matrix(format, f"layers.{layer}.o", f"{source}.self_attn.o_proj.weight"),
            self.plain(f"{source}.post_attention_layernorm.weight"),
            *self.matrix(format, f"layers.{layer}.gate_up", *gate_up),
            *self.matrix(format, f"layers.{layer}.down", f"{source}.mlp.down_proj.weight"),
        ]

    def linear_layers(self, head_format: str) -> Iterator[Weight]:
        """The tensors of aligner, generation head and caption projection."""
        for name in self.checkpoint.names():
            linear, _, part = name.rpartition(".")
            if not linear.startswith(LINEAR):
                continue
            if part == "weight":
                format = head_format if linear in HEAD_MATRICES else "none"
                yield from self.matrix(format, linear, name)
            else:
                yield self.plain(name)

    def plain(self, name: str) -> Weight:
        """A tensor as the checkpoint has it, in the dtype."""
        is_cast = self.checkpoint.stored_bytes(name) != self._num_bytes(name)
        return Weight(
            name,
            self.checkpoint.shape(name),
            self.dtype,
            partial(self._read, name),
            working_bytes=self._working_bytes(is_cast, name),
        )

    def matrix(self, format: str, name: str, *sources: str) -> list[Weight]:
        """Linear weights [out, in] side by side, as one [in, sum of out], or the two tensors of its
        quantized form.
        """
        num_outputs = [self.checkpoint.shape(source)[0] for source in sources]
        shape = (self.checkpoint.shape(sources[0])[1], sum(num_outputs))
        scheme = choose_scheme(format, shape[0], num_outputs)
        if scheme is None:
            working_bytes = self._working_bytes(2, *sources)
            make = partial(self._concatenated, sources)
            return [Weight(name, shape, self.dtype, make, working_bytes=working_bytes)]
        readers = [partial(self._read, source) for source in sources]
        made = QuantizedMatrix(name, shape, readers, scheme, self.dtype)
        stored = stored_shape(scheme, *shape)
        working_bytes = torch.Size(stored).numel() + max(map(self._reading_bytes, sources))
        codes_dtype = STORED_DTYPES[scheme.format]
        return [
            Weight(name, stored, codes_dtype, made.codes, scheme, working_bytes),
            Weight(scale_name(name), scale_shape(scheme, *shape), self.dtype, made.scale, scheme),
        ]

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name, self.dtype)
        return permute_heads(name, tensor, self.table.head_order, self.checkpoint.config)

    def _concatenated(self, sources: tuple[str, ...]) -> Tensor:
        return torch.cat([self._read(source) for source in sources]).T.contiguous()

    def _num_bytes(self, source: str) -> int:
        """A tensor's bytes in the dtype."""
        return torch.Size(self.checkpoint.shape(source)).numel() * self.dtype.itemsize

    def _working_bytes(self, copies: int, *sources: str) -> int:
        """Copies in the dtype of all sources together, beside one of them as it is stored."""
        stored = max(map(self.checkpoint.stored_bytes, sources))
        return copies * sum(map(self._num_bytes, sources)) + stored

    def _reading_bytes(self, source: str) -> int:
        """A tensor in the dtype beside it as it is stored, or twice while its heads are
        permuted.
        """
        own, stored = self._num_bytes(source), self.checkpoint.stored_bytes(source)
        is_copied = PROJECTION.fullmatch(source) is not None
        return max(own + stored * (own != stored or is_copied), own * (1 + is_copied))
