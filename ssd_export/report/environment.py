"""Environment of a measurement: processor, memory, device, and the versions of what computed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from ssd_export.machine import num_cpus, total_bytes
from ssd_export.version import TOOL_VERSION

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "transformers",
    "triton",
)
BUSY_LOAD = 0.7  # processes that want a core, averaged over a minute
VECTOR_UNITS = ("avx512f", "avx2", "asimd")  # the widest one is named


def machine() -> dict[str, Any]:
    """{"system", "cpu", "cores", "memory_gib", "device"}; device is None without a GPU that
    nvidia-smi names.
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": num_cpus(),
        "memory_gib": round((total_bytes() or 0) / 2**30, 1),
        "device": device_name(),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of this tool, Python and the packages among the given that are installed; nothing is
    imported.
    """
    found = {"ssd-export": TOOL_VERSION, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def load_average() -> float | None:
    """Processes that wanted a core in the minute before; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_note() -> str:
    """A sentence where other work has kept the machine busy over the last minute, else ""."""
    load = load_average() or 0.0
    return (
        f"Machine busy with other work: load {load:.1f} when the measurement began."
        if load >= BUSY_LOAD
        else ""
    )


def device_name() -> str | None:
    """Name and driver of the first NVIDIA GPU, None without one."""
    found = _nvidia_smi("name,driver_version")
    return None if found is None else " ".join(found.replace(", ", " (driver ").split()) + ")"


def device_memory_bytes() -> int | None:
    """Bytes in use on the first NVIDIA GPU, by whomever; None without one."""
    found = _nvidia_smi("memory.used")
    return None if found is None else int(found.split()[0]) << 20


def _nvidia_smi(query: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            asked, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip().splitlines()[0] if answer.strip() else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        line.split(":")[0].strip().lower(): line.partition(":")[2].strip()
        for line in lines
        if ":" in line
    }
    name = facts.get("model name") or facts.get("hardware") or platform.machine()
    flags = (facts.get("flags") or facts.get("features") or "").split()
    units = [unit.upper() for unit in VECTOR_UNITS if unit in flags]
    return f"{name} ({units[0]})" if units else name
