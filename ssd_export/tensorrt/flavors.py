"""The two builds of TensorRT, which have the same Python names: the module is picked here and
nowhere else.

Importing it for TensorRT-RTX also sees to the library name that its parser would abort for
(stub_library.py).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ssd_export.errors import UserError
from ssd_export.plan.stages import BUILDS_ANYWHERE
from ssd_export.tensorrt.stub_library import load_stub

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "ssd-export[tensorrt]", "tensorrt-rtx": "ssd-export[rtx]"}


@dataclass(frozen=True)
class Flavor:
    """A flavor of TensorRT. name: tensorrt or tensorrt-rtx; trt: its Python module."""

    name: str
    version: str
    trt: Any

    @property
    def builds_anywhere(self) -> bool:
        """Whether engines are built for GPUs that this machine does not have."""
        return self.name in BUILDS_ANYWHERE

    @property
    def lists_layers(self) -> bool:
        """Whether the builder lists what every layer reads and writes (layer_listing.py)."""
        return self.name == "tensorrt-rtx"

    def accepts(self, capability: int) -> bool:
        """Whether an engine can be built for a compute capability (times ten) by its number."""
        return self.builds_anywhere and f"SM{capability}" in self.trt.ComputeCapability.__members__


def is_installed(name: str) -> bool:
    """Whether the Python package of a flavor can be imported."""
    return find_spec(MODULES[name]) is not None


def load_flavor(name: str) -> Flavor:
    """The flavor, ready to parse and build. Raises: UserError where it is not installed or does
    not load.
    """
    if not is_installed(name):
        raise UserError(missing([name]))
    try:
        trt = importlib.import_module(MODULES[name])
        if name == "tensorrt-rtx":
            load_stub("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is installed but does not load ({reason}); install it again: pip install "
            f"--force-reinstall {EXTRAS[name]}"
        ) from error
    return Flavor(name, trt.__version__, trt)


def missing(names: list[str]) -> str:
    """The message where none of these flavors is installed."""
    ways = " or ".join(f"pip install {EXTRAS[name]}" for name in names)
    jetpack = (
        " (on a Jetson, JetPack brings it: sudo apt install python3-libnvinfer)"
        if "tensorrt" in names
        else ""
    )
    return f"build-engine needs {' or '.join(names)}, which is not installed: {ways}{jetpack}"
