"""Probes, each tried in a separate process (child.py): libraries that are broken end their process,
hang, or write where nobody can stop them.

A probe returns plain facts, or raises UserError with one line.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from ssd_export.doctor.one_node_graph import VALUE, one_node_model
from ssd_export.errors import UserError

Facts = dict[str, Any]


def onnxruntime() -> Facts:
    """{"version", "providers"}: those that it was built with."""
    import onnxruntime as ort

    return {"version": ort.__version__, "providers": ort.get_available_providers()}


def provider(name: str) -> Facts:
    """Opens the one-node graph with an execution provider, runs it and compares what it gives.

    Raises: UserError where the provider did not start, which ONNX Runtime replaces silently.
    """
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(one_node_model(), options, providers=[name])
    if session.get_providers()[0] != name:
        raise UserError("it does not start: its libraries or its device are missing")
    (found,) = session.run(None, {"x": np.array([VALUE], np.float32)})
    if found.tolist() != [2 * VALUE]:
        raise UserError(f"it computes {found.tolist()} for {VALUE} + {VALUE}")
    return {}


def operators() -> Facts:
    """Loads the library of operators that the CPU is given. {"path"}: "" where none was built."""
    import onnxruntime as ort

    from ssd_export.runtime.ort_operators import add_operators, find_operators

    library, options = find_operators(), ort.SessionOptions()
    if library is None:
        return {"path": ""}
    add_operators(options, library)
    ort.InferenceSession(one_node_model(), options)
    return {"path": str(library)}


def torch() -> Facts:
    """{"version", "cuda", "gpu", "threads"}: of CUDA, the version that it was built for; gpu is
    None where it finds none.
    """
    import torch

    one = torch.full((1,), VALUE)
    if (one + one).tolist() != [2 * VALUE]:
        raise UserError(f"it computes {(one + one).tolist()} for {VALUE} + {VALUE}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def exporter() -> Facts:
    """Imports everything that export needs."""
    import ssd_export.export.exporter  # noqa: F401 - whether it can be imported is what is asked

    return {}


def runner(name: str) -> Facts:
    """Imports a runner with everything that it needs."""
    from ssd_export.runtime.runners import find_runner

    find_runner(name).load()
    return {}


def flavor(name: str) -> Facts:
    """Loads a TensorRT. {"version"}"""
    from ssd_export.tensorrt.flavors import load_flavor

    return {"version": load_flavor(name).version}


def plugin(name: str) -> Facts:
    """Loads the plugin library into a TensorRT. {"library"}"""
    from ssd_export.tensorrt.flavors import load_flavor
    from ssd_export.tensorrt.plugin import find_library, load_library

    library = find_library()
    load_library(load_flavor(name), library)
    return {"library": str(library)}


def gpu() -> Facts:
    """{"capability", "cuda"}: of the first GPU, and the newest CUDA that its driver runs.

    Raises: UserError without a GPU or a driver.
    """
    from ssd_export.tensorrt.target import gpu_here

    capability = gpu_here()
    if capability is None:
        raise UserError("no NVIDIA GPU, or no driver for it")
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return {
        "capability": f"{capability // 10}.{capability % 10}",
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def cuda_python() -> Facts:
    """Opens the driver as the trt runner does."""
    from ssd_export.tensorrt.cuda_device import open_driver

    open_driver()
    return {}
