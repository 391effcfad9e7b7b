"""The memory that a build will need, estimated and compared with what is free before any work starts.

Measured with TensorRT-RTX on the decode step of Janus-Pro-1B's shape in fp16 (2.5 GB of weights): 6.1 GB at the peak
with the weights inside (7.5 GiB on another export), 0.6 GB with its matrices as inputs, which the builder never reads.
TensorRT times its tactics on the device and allocates inputs there, which on a Jetson is the same memory: not measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ssd_export.bundle import Bundle
from ssd_export.build.flavours import Flavour
from ssd_export.build.targets import Target
from ssd_export.errors import UserError

COPIES_WHILE_BUILDING = 3
BASE_BYTES = {"tensorrt-rtx": 1 << 30, "tensorrt": 2 << 30}  # the second is a guess: no GPU was at hand
FREE_BYTES = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the weights file. dtype as in a TensorSpec; offset in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def stored_weights(bundle: Bundle) -> dict[str, StoredWeight]:
    """Every tensor of the bundle's weights file, by name."""
    dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with open(bundle.file(weights_file(bundle)), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return {
        name: StoredWeight(
            dtypes[entry["dtype"]],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def weights_file(bundle: Bundle) -> str:
    """Its name in the bundle, which the text embeddings share."""
    return bundle.config["text_embeddings"]["file"]


def is_shared(weight: StoredWeight) -> bool:
    """Whether a weight becomes an input of prefill and decode_step: the matrices, which are nearly all the bytes."""
    return len(weight.shape) == 2


def needed_bytes(bundle: Bundle, target: Target, flavour: Flavour) -> int:
    """What building this bundle's largest engine will take at its peak."""
    embeddings = bundle.config["text_embeddings"]["offset"]  # no engine holds them
    weights = [weight for weight in stored_weights(bundle).values() if weight.offset != embeddings]
    shared = sum(weight.num_bytes for weight in weights if is_shared(weight) and target.shared_weights)
    total = sum(weight.num_bytes for weight in weights)
    on_device = 0 if flavour.builds_anywhere else shared + (target.workspace_mib << 20)
    return BASE_BYTES[flavour.name] + COPIES_WHILE_BUILDING * (total - shared) + on_device


def free_bytes(
    meminfo: Path = FREE_BYTES[0], limit: Path = FREE_BYTES[1], used: Path = FREE_BYTES[2]
) -> int | None:
    """Memory and swap that can be had now, within the container's limit; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return free


def check_memory(needed: int, free: int | None, dtype: str) -> None:
    """Raises: UserError with three ways out where less is free than is needed."""
    if free is None or needed <= free:
        return
    smaller = (
        "export with --dtype fp16 (half the weights)"
        if dtype == "float32"
        else "build with a smaller --workspace and --batch"
    )
    raise UserError(
        f"building needs about {gib(needed)} of memory and {gib(free)} are free: {smaller}, free memory or add "
        f"{gib(needed - free)} of swap, or build on a larger machine with the same GPU (--target rtx: any machine) and "
        "copy the bundle back"
    )


def gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{max(1, num_bytes >> 20)} MiB"
