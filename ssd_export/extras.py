"""Packages that a verb needs beyond those of a board, and what to type where one is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from ssd_export.errors import UserError, first_line

# Of an extra of pyproject.toml, the modules that whoever needs it cannot do without.
EXTRAS = {
    "export": ("torch", "onnx", "onnx_ir", "safetensors"),
    "ort": ("onnxruntime",),
    "bench": ("transformers",),
    "embed": ("torch", "safetensors", "transformers"),
    "kernels": ("triton",),
    "tensorrt": ("tensorrt", "cuda"),
    "rtx": ("tensorrt_rtx",),
    "ray": ("ray",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
}
# Modules that one option alone needs, and the extra that brings them.
OTHERS = {"huggingface_hub": "export", "matplotlib": "export"}


def check_extras(names: Sequence[str]) -> None:
    """Raises UserError for a package of these extras that is not installed."""
    for name in names:
        for module in EXTRAS[name]:
            if importlib.util.find_spec(module) is None:
                raise UserError(f"this needs {module}, which {sys.executable} lacks: {fix(name)}")


def missing_package(error: ImportError) -> str | None:
    """One line for a package that is missing or does not load; None for a module of ours."""
    root = (error.name or "").split(".")[0]
    if root == "ssd_export":
        return None
    owners = (name for name, modules in EXTRAS.items() if root in modules)
    extra = next(owners, OTHERS.get(root))
    way_out = fix(extra) if extra else again()
    if isinstance(error, ModuleNotFoundError):
        return f"{root or error} is not installed for {sys.executable}: {way_out}"
    reason = first_line(error)
    return f"{root or 'a library'} cannot be loaded ({reason}); install it again: {way_out}"


def fix(extra: str) -> str:
    """The command that installs an extra."""
    return f'{sys.executable} -m pip install "ssd-export[{extra}]"'


def again() -> str:
    """The command that installs what every verb needs."""
    return f"{sys.executable} -m pip install ssd-export"
