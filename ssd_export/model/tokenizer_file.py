"""tokenizer.json as a file from somebody else: read within limits, and refused where it could stop
the process or generate something else every time.

The tokenizers library runs what the file describes. A normalizer that doubles every letter forty
times takes all memory, and Rust then ends the process without an exception; dropout chooses other
tokens at every call.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_export.errors import UserError
from ssd_export.files import read_file
from ssd_export.os_errors import os_error

MAX_BYTES = 128 << 20  # the largest vocabularies in use, a quarter of a million words, take 35 MB
MAX_GROWTH = 64  # of a text by all normalizers together; NFKD makes up to 18 letters of one
GROWTH = {
    "NFC": 3,
    "NFKC": 18,
    "NFD": 4,
    "NFKD": 18,
    "Lowercase": 3,
    "StripAccents": 1,
    "Strip": 1,
    "Nmt": 1,
    "ByteLevel": 4,
    "BertNormalizer": 6,
}


def read_tokenizer(path: Path) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises: UserError."""
    try:
        spec = json.loads(read_file(path, MAX_BYTES))
    except FileNotFoundError:
        raise UserError(
            f"no tokenizer at {path}: take tokenizer.json from the model's repository"
        ) from None
    except OSError as error:
        raise os_error(error, "read", path) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise UserError(f"{path} is not a tokenizer.json ({reason}): download it again") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(f"{path} is not a tokenizer.json (no model in it): download it again")
    if spec["model"].get("dropout"):
        raise UserError(
            f"{path}: model.dropout is {str(spec['model']['dropout'])[:20]}, which splits a prompt"
            " in other tokens every time: set it to null"
        )
    growth = _growth(path, spec.get("normalizer"))
    if growth > MAX_GROWTH:
        raise UserError(
            f"{path}: its normalizer can make a prompt {growth} times as long, and no tokenizer"
            f" needs more than {MAX_GROWTH}: take tokenizer.json from the model's repository"
        )
    return spec


def _growth(path: Path, normalizer: Any) -> int:
    """The most letters that one letter of a text can become, at least 1."""
    if normalizer is None:
        return 1
    kind = normalizer.get("type") if isinstance(normalizer, Mapping) else None
    if kind == "Sequence" and isinstance(normalizer.get("normalizers"), list):
        growth = 1
        for part in normalizer["normalizers"]:
            growth = min(growth * _growth(path, part), MAX_GROWTH**2)  # enough to be refused
        return growth
    if kind == "Prepend":
        return 1 + len(str(normalizer.get("prepend")))
    if kind == "Replace":
        pattern = normalizer.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, Mapping) else None
        content = len(str(normalizer.get("content")))
        # an expression can match the empty text beside every letter
        return (
            max(1, -(-content // len(plain))) if isinstance(plain, str) and plain else content + 1
        )
    if kind == "Precompiled":
        return _growth_of_map(path, normalizer.get("precompiled_charsmap"))
    if kind in GROWTH:
        return GROWTH[kind]
    raise UserError(
        f"{path}: the normalizer {str(kind)[:40]!r} is none that is known to be safe: take"
        " tokenizer.json from the model's repository"
    )


def _growth_of_map(path: Path, encoded: Any) -> int:
    """The longest text that SentencePiece's map has for one letter: the size of its trie, the trie,
    then the texts, each ended by a zero byte.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
        texts = content[4 + int.from_bytes(content[:4], "little") :].decode("utf-8").split("\0")
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: precompiled_charsmap is damaged: take tokenizer.json from the model's"
            " repository"
        ) from None
    return max(1, *map(len, texts))
