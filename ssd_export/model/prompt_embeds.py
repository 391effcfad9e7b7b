"""Prompts that a text encoder has embedded: one safetensors file.

    prompt_embeds    F32, F16 or BF16 [N, T, width]
    attention_mask   integer or bool [N, T], 1 for a caption's tokens, 0 for padding on either side;
                     without it every token counts

Read with numpy alone. Source of the names: diffusers' pipelines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ssd_export.dtypes import BY_SAFETENSORS
from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.os_errors import os_error

EMBEDS, MASK = "prompt_embeds", "attention_mask"
MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 8 << 20  # embed-prompts writes the prompts into it
EMBED_AGAIN = "write prompt_embeds [N, T, width] and attention_mask [N, T] with safetensors"


def read_prompt_embeds(path: Path) -> list[np.ndarray]:
    """float32 [tokens, width] of each prompt, padding cut.

    Raises: UserError for a file that cannot be read, lacks the embeddings, or whose mask does not
    fit.
    """
    try:
        content = read_file(path, MAX_FILE_BYTES)
    except OSError as error:
        raise os_error(error, "read", path) from None
    tensors = _tensors(path, content)
    embeds = tensors.get(EMBEDS)
    if embeds is None or embeds.ndim != 3 or not embeds.size:
        raise UserError(f"{path} has no {EMBEDS} [N, T, width]: {EMBED_AGAIN}")
    mask = tensors.get(MASK, np.ones(embeds.shape[:2], np.int64))
    if mask.shape != embeds.shape[:2] or not np.isin(mask, (0, 1)).all():
        raise UserError(
            f"{path}: {MASK} of shape {list(mask.shape)} is no mask of {list(embeds.shape[:2])}:"
            f" {EMBED_AGAIN}"
        )
    prompts = [rows[own.astype(bool)] for rows, own in zip(embeds, mask, strict=True)]
    empty = next((number for number, rows in enumerate(prompts) if not len(rows)), None)
    if empty is not None:
        raise UserError(f"{path}: prompt {empty} has no token that counts: {EMBED_AGAIN}")
    return prompts


def _tensors(path: Path, content: bytes) -> dict[str, np.ndarray]:
    """The two tensors that are known, numbers as float32 or int64. Raises: UserError."""
    length = int.from_bytes(content[:8], "little")
    damaged = UserError(f"{path} is truncated or no safetensors file: {EMBED_AGAIN}")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(content) - 8):
        raise damaged
    try:
        entries = json.loads(content[8 : 8 + length])
        return {
            name: _array(entries[name], memoryview(content)[8 + length :])
            for name in (EMBEDS, MASK)
            if name in entries
        }
    except (ValueError, KeyError, TypeError, OverflowError):
        raise damaged from None


def _array(entry: dict[str, Any], data: memoryview) -> np.ndarray:
    """An array of the file. Raises: ValueError, KeyError or TypeError for an entry that does not
    fit the data.
    """
    row, (start, end) = BY_SAFETENSORS[entry["dtype"]], entry["data_offsets"]
    if not 0 <= start <= end <= len(data):
        raise ValueError("outside the file")
    values = np.frombuffer(data[start:end], row.numpy).reshape(entry["shape"])
    if row.name == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
