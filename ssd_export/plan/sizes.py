"""The weights of a bundle in bytes, by what needs them, from its plan or from its file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from ssd_export.bundle import Bundle
from ssd_export.config import EMBED_TOKENS
from ssd_export.dtypes import BY_SAFETENSORS

CODES = ("int8", "uint8", "float8_e4m3fn")  # of quantized matrices


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the weights file. dtype as in a TensorSpec; offset in bytes from the start of the
    file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a weights file.

    embeddings: the text embedding table, which stays on disk and is read row by row; image_decoder:
    `vqmodel.*`;
    codes: quantized matrices without their scales; steps: everything else that prefill and decode
    step multiply by.
    """

    embeddings: int
    image_decoder: int
    codes: int
    steps: int

    @property
    def total(self) -> int:
        """Bytes of the weights file."""
        return self.embeddings + self.image_decoder + self.codes + self.steps

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, str, int]]) -> WeightSizes:
        """Sums sizes over (name, dtype, bytes) of every tensor."""
        sizes = dict.fromkeys(("embeddings", "image_decoder", "codes", "steps"), 0)
        for name, dtype, num_bytes in tensors:
            kind = (
                "embeddings"
                if name == EMBED_TOKENS
                else "image_decoder"
                if name.startswith("vqmodel.")
                else "codes"
                if dtype in CODES
                else "steps"
            )
            sizes[kind] += num_bytes
        return cls(**sizes)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> WeightSizes:
        """Sizes of a bundle's weights."""
        return cls.of(
            (name, weight.dtype, weight.num_bytes)
            for name, weight in stored_weights(bundle).items()
        )


def stored_weights(bundle: Bundle) -> dict[str, StoredWeight]:
    """Every tensor of the bundle's weights file, by name."""
    with bundle.file(weights_file(bundle)).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return {
        name: StoredWeight(
            BY_SAFETENSORS[entry["dtype"]].name,
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def weights_file(bundle: Bundle) -> str:
    """Its name in the bundle, which the text embeddings share."""
    return bundle.config.text_embeddings.file
