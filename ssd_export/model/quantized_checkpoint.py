"""Checkpoints whose weights are quantized already (bitsandbytes, GPTQ, AWQ, NVFP4, fp8, ...).

An export reads float weights and quantizes by itself. That a checkpoint is quantized stands in
config.json (`quantization_config`), in a file of the tool that made it, or only in the names of its
tensors; whichever it is, the answer is one sentence before anything else is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssd_export.errors import UserError
from ssd_export.model.weight_files import read_json
from ssd_export.os_errors import is_file

KEYS = ("quantization_config", "compression_config")
SECTIONS = ("text_config", "language_config")
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
SUFFIXES = {  # of tensors that stand beside codes
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "fp8 or NVFP4",
    ".weight_scale_2": "NVFP4",
    ".weight_scale_inv": "fp8",
    ".input_scale": "fp8 or NVFP4",
}
WAY_OUT = (
    "give the checkpoint with float weights that it was made from, for example"
    " deepseek-community/Janus-Pro-1B, and quantize at export with --weights int8, int4 or fp8"
)


def refuse_quantized_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError where config.json, or a quantizer's file beside it, says that the weights
    are quantized.
    """
    sections = [config, *(config.get(name) for name in SECTIONS)]
    for section in sections:
        if not isinstance(section, Mapping):
            continue
        for key in KEYS:
            if section.get(key):
                raise _refusal(f"{directory / 'config.json'}: {key}", _describe(section[key]))
    for name in FILES:
        if is_file(directory / name):
            raise _refusal(f"{directory / name}", _describe(read_json(directory / name)))


def refuse_quantized_names(directory: Path, names: Iterable[str]) -> None:
    """Raises UserError where the names of tensors say so, whatever the configuration says."""
    for name in names:
        for suffix, method in SUFFIXES.items():
            if name.endswith(suffix):
                raise _refusal(f"{directory}: the tensor {name}", method)


def _describe(values: Any) -> str:
    """Method and format as far as the dialects of the tools have them in common."""
    if not isinstance(values, Mapping):
        return str(values)[:60]
    inner = values.get("quantization")
    inner = inner if isinstance(inner, Mapping) else {}
    parts = [
        values.get("quant_method") or inner.get("quant_algo") or values.get("quant_type"),
        values.get("quant_algo"),
        values.get("format") or values.get("fmt") or values.get("bnb_4bit_quant_type"),
    ]
    bits = values.get("bits") or values.get("w_bit")
    bits = bits or next((n for n in (4, 8) if values.get(f"load_in_{n}bit") is True), None)
    parts.append(f"{bits} bits" if bits else None)
    return ", ".join(dict.fromkeys(str(part)[:40] for part in parts if part)) or "no method named"


def _refusal(where: str, method: str) -> UserError:
    return UserError(f"{where} says that the weights are quantized already ({method}): {WAY_OUT}")
