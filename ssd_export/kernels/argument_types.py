"""Types of the kernels' arguments by their names, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ssd_export.policy.presets import MAX_GROUPS

# "*T" points to the dtype of the cache; a tuple has a type for each head group of a layer.
ArgumentType = str | tuple[str, ...]
INTEGERS = (
    *("position_ptr", "prompt_length_ptr", "present_ptr"),
    *("active_ptr", "counts_ptr"),
)
FLOATS = ("logits_ptr", "score_ptr", "sums_ptr", "largest_ptr", "total_ptr")
# The other pointers are to the cache's dtype, the other numbers are integers.
TYPES = {
    **dict.fromkeys(INTEGERS, "*int32"),
    **dict.fromkeys(FLOATS, "*float32"),
    "score_decay": "float32",
}
CACHES = {
    "cache_keys": "*T",
    "cache_values": "*T",
    "cache_positions": "*int32",
    "cache_scores": "*float32",
}


def argument_types(kernel: Any, compiled_in: Iterable[str]) -> dict[str, ArgumentType]:
    """Type of every argument of a launch, in order. compiled_in: parameters that are none."""
    from ssd_export.kernels.layer_groups import OF_GROUPS

    of_groups = CACHES | dict.fromkeys(OF_GROUPS, "int32")

    def of(name: str) -> ArgumentType:
        if name in of_groups:
            return (of_groups[name],) * MAX_GROUPS
        return TYPES.get(name, "*T" if name.endswith("_ptr") else "int32")

    return {name: of(name) for name in kernel.arg_names if name not in compiled_in}
