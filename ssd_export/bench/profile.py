"""onnxruntime's own profile of decode steps, summed by operator kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ssd_export.export.functions import OP_TYPE

OUTSIDE = "outside operators"


def summarise(files: dict[str, Path], steps: int) -> list[dict[str, Any]]:
    """[{"operator", "ms", "share", "calls"}] of one average step, the greatest first; evictions
    count with it.

    Args: files: profile of each graph by name; those of decode_step and evict are summed over
    `steps` steps.
    """
    micros: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    whole = 0
    for graph, path in files.items():
        if not graph.startswith(("decode_step", "evict")):
            continue
        for event in json.loads(path.read_text(encoding="utf-8")):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                kind = "evict graph" if graph.startswith("evict") else operator_kind(event)
                micros[kind] += event["dur"]
                calls[kind] += 1
            elif event["name"] == "model_run":
                whole += event["dur"]
    micros[OUTSIDE] = whole - sum(micros.values())
    return [
        {
            "operator": kind,
            "ms": total / 1000 / steps,
            "share": total / whole,
            "calls": calls[kind] / steps,
        }
        for kind, total in micros.most_common()
    ]


def operator_kind(event: dict[str, Any]) -> str:
    """The operator's name, and of a matrix product whether it is the attention's or one with
    weights.
    """
    operator = event["args"]["op_name"]
    if "MatMul" not in operator and "Gemm" not in operator:
        return operator
    return f"{operator}, attention" if OP_TYPE in event["name"] else f"{operator}, weights"
