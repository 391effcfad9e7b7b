"""The bundle's one weights file: `onnx/weights.safetensors`, written tensor by tensor, read by
every backend.

A safetensors file is a JSON header and then raw tensors, so an ONNX initializer can point into it
as external data while torch and numpy read it by name. Matrices are stored as the graphs multiply
them ([in, out]), q, k and v as one matrix, gate and up as one, heads in the order of the policy
table: no backend rearranges weights at load.

    header   8 bytes little-endian length, JSON {name: {dtype, shape, data_offsets}}, spaces up to a
    multiple of 64 data     the tensors in the order of the header, without gaps
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ssd_export.config import EMBED_TOKENS
from ssd_export.dtypes import of_torch
from ssd_export.export.journal import Journal
from ssd_export.export.quantize import HEAD_MATRICES, QuantizedMatrix, scale_name
from ssd_export.model.checkpoint import PROJECTION, Checkpoint, permute_heads
from ssd_export.model.conversion import check_finite
from ssd_export.model.quantization import (
    STORED_DTYPES,
    Scheme,
    choose_scheme,
    scale_shape,
    stored_shape,
)
from ssd_export.policy.table import PolicyTable

WEIGHTS_FILE = "weights.safetensors"
ALIGNMENT = 64
LINEAR = ("generation_aligner.", "generation_head.", "caption_projection.")
NOT_FINITE = "use --dtype fp32, or --weights none"


@dataclass(frozen=True)
class Weight:
    """One tensor of the file and how it is made from the checkpoint; shape is known before anything
    is read.

    scheme: of the codes and the scale of a quantized matrix (model/quantization.py).
    working_bytes: the most memory that making it takes, itself included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    scheme: Scheme | None = None
    working_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in the weights file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
    config = checkpoint.config

    def read(name: str) -> Tensor:
        return permute_heads(name, checkpoint.tensor(name, dtype), table.head_order, config)

    def working_bytes(copies: float, *sources: str) -> int:
        """Copies in dtype of all sources together, beside one of them as it is stored."""
        numbers = [torch.Size(checkpoint.shape(source)).numel() for source in sources]
        return int(copies * dtype.itemsize * sum(numbers)) + max(
            map(checkpoint.stored_bytes, sources)
        )

    def reading_bytes(source: str) -> int:
        """A tensor in dtype beside it as it is stored, or twice while its heads are permuted."""
        own = torch.Size(checkpoint.shape(source)).numel() * dtype.itemsize
        stored = checkpoint.stored_bytes(source)
        is_copied = PROJECTION.fullmatch(source) is not None
        return max(own + stored * (own != stored or is_copied), own * (1 + is_copied))

    def matrix(name: str, *sources: str) -> Weight:
        """Linear weights [out, in] side by side, as one [in, sum of out]."""
        rows = sum(checkpoint.shape(source)[0] for source in sources)
        shape = (checkpoint.shape(sources[0])[1], rows)
        return Weight(
            name,
            shape,
            dtype,
            lambda: torch.cat([read(source) for source in sources]).T.contiguous(),
            working_bytes=working_bytes(2, *sources),
        )

    def quantized_matrix(format: str, name: str, *sources: str) -> list[Weight]:
        """The matrix, or the two tensors of its quantized form."""
        whole = matrix(name, *sources)
        scheme = choose_scheme(
            format, whole.shape[0], [checkpoint.shape(source)[0] for source in sources]
        )
        if scheme is None:
            return [whole]
        made = QuantizedMatrix(
            name,
            (whole.shape[0], whole.shape[1]),
            [partial(read, one) for one in sources],
            scheme,
            dtype,
        )
        stored = stored_shape(scheme, *whole.shape)
        return [
            Weight(
                name,
                stored,
                STORED_DTYPES[scheme.format],
                made.codes,
                scheme,
                torch.Size(stored).numel() + max(map(reading_bytes, sources)),
            ),
            Weight(scale_name(name), scale_shape(scheme, *whole.shape), dtype, made.scale, scheme),
        ]

    def plain(name: str) -> Weight:
        copies = (
            checkpoint.stored_bytes(name)
            != torch.Size(checkpoint.shape(name)).numel() * dtype.itemsize
        )
        return Weight(
            name,
            checkpoint.shape(name),
            dtype,
            lambda: read(name),
            working_bytes=working_bytes(copies, name),
        )

    layer_matrix = partial(quantized_matrix, quantized)
    weights: list[Weight] = []
    for layer in range(config.num_layers):
        source = f"language_model.layers.{layer}"
        attention = [f"{source}.self_attn.{part}_proj.weight" for part in "qkv"]
        weights += [
            plain(f"{source}.input_layernorm.weight"),
            *layer_matrix(f"layers.{layer}.qkv", *attention),
            *layer_matrix(f"layers.{layer}.o", f"{source}.self_attn.o_proj.weight"),
            plain(f"{source}.post_attention_layernorm.weight"),
            *layer_matrix(
                f"layers.{layer}.gate_up",
                f"{source}.mlp.gate_proj.weight",
                f"{source}.mlp.up_proj.weight",
            ),
            *layer_matrix(f"layers.{layer}.down", f"{source}.mlp.down_proj.weight"),
        ]
    weights.append(plain("language_model.norm.weight"))
    weights.append(plain("generation_embeddings.weight"))
    for name in checkpoint.names():
        linear, _, part = name.rpartition(".")
        if linear.startswith(LINEAR):
            format = head_quantized if linear in HEAD_MATRICES else "none"
            weights += quantized_matrix(format, linear, name) if part == "weight" else [plain(name)]
    weights += [plain(name) for name in checkpoint.names() if name.startswith("vqmodel.")]
    weights.append(plain(EMBED_TOKENS))
    return weights


def write_weights(
    path: Path,
    weights: Iterable[Weight],
    journal: Journal,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, tuple[int, int]]:
    """Writes the file, one tensor in memory at a time, from where the journal says that it ends.

    Args: progress: told the bytes of what is there already, then of each tensor written.
    Returns: (offset, length) in bytes of each tensor.
    Raises: UserError for a value that is not finite; ValueError if a tensor is not what was planned
    (a bug).
    """
    weights = list(weights)
    header, places = _header(weights)
    stream, finished = journal.open_weights(
        path, header, [sum(places[weight.name]) for weight in weights]
    )
    with stream:
        progress(sum(weight.num_bytes for weight in weights[:finished]))
        for weight in weights[finished:]:
            tensor = weight.make()
            if tensor.shape != weight.shape or tensor.dtype != weight.dtype:
                raise ValueError(
                    f"{weight.name} is {tensor.dtype} {tuple(tensor.shape)}, planned {weight}"
                )
            if tensor.dtype.is_floating_point and tensor.element_size() > 1:
                check_finite(tensor, f"{weight.name}, as it would be written,", NOT_FINITE)
            stream.write(
                tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b""
            )
            del tensor  # else it would still be there while the next one is made
            journal.note(weight.name, *stream.finished())
            progress(weight.num_bytes)
    return places


def _header(weights: list[Weight]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    entries: dict[str, dict[str, object]] = {}
    ranges: dict[str, tuple[int, int]] = {}
    offset = 0
    for weight in weights:
        end = offset + weight.num_bytes
        ranges[weight.name] = (offset, weight.num_bytes)
        entries[weight.name] = {
            "dtype": of_torch(weight.dtype).safetensors,
            "shape": list(weight.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    places = {name: (start + begin, length) for name, (begin, length) in ranges.items()}
    return len(text).to_bytes(8, "little") + text, places
