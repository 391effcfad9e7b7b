"""The library of operators that ONNX Runtime is given on a CPU: where it comes from.

It is `libssd_export_operators.so` (engines/README.md): $SSD_EXPORT_OPERATORS, else build/operators
in the source tree that this package runs from. Never one in the folder where somebody happens to
stand: a library is code. Without it the ordinary operators of the bundle's decode step do the same,
but for rounding.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ssd_export.bundle import Bundle
from ssd_export.bundle.graphs import FUSED
from ssd_export.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort

    from ssd_export.noise import GumbelNoise

LIBRARY = "libssd_export_operators.so"
LIBRARY_VARIABLE = "SSD_EXPORT_OPERATORS"
SOURCE_TREE = Path(__file__).parents[2]
BUILD = "make operators, in the source tree of this package (engines/README.md)"
HOW_TO_BUILD = f"{BUILD}, or leave out {LIBRARY_VARIABLE} for ordinary operators"


def find_operators() -> Path | None:
    """The library, absolute; None where none was built. Raises: UserError where the variable
    names no file.
    """
    asked = os.environ.get(LIBRARY_VARIABLE)
    place = Path(asked) if asked else SOURCE_TREE / "build" / "operators" / LIBRARY
    if place.is_file():
        return place.resolve()
    if asked:
        raise UserError(f"{LIBRARY_VARIABLE}={asked} is no library; build it: {HOW_TO_BUILD}")
    return None


def has_fused_step(bundle: Bundle) -> bool:
    """Whether the bundle has a decode step that uses the operators."""
    return f"onnx/decode_step{FUSED}.onnx" in bundle.files


def add_operators(options: ort.SessionOptions, library: Path) -> None:
    """Gives the library's operators to a session. Raises: UserError where it does not load."""
    import onnxruntime as ort

    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's own classes, of no common base
        raise UserError(
            f"{library} does not load into onnxruntime {ort.__version__} ({first_line(error)});"
            f" build it again: {HOW_TO_BUILD}"
        ) from error


def noise_maker(library: Path) -> type[GumbelNoise]:
    """GumbelNoise with the same bits from the library's own code, 3 to 8 times as fast as numpy's;
    GumbelNoise itself where the library does not load, which opening a graph says.
    """
    from ssd_export.noise import GumbelNoise

    try:
        fill = ctypes.CDLL(str(library)).ssd_export_fill_noise
    except (OSError, AttributeError):
        return GumbelNoise
    words = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64
    fill.argtypes, fill.restype = (*words, ctypes.c_void_p), None

    class NativeNoise(GumbelNoise):
        """Noise that the library fills in."""

        def fill(self, noise: np.ndarray, steps: range) -> None:
            """Writes g of these steps to the first rows of noise, float32 [any, images,
            codebook].
            """
            assert noise.dtype == "float32" and noise.flags.c_contiguous
            row_bytes, place = 4 * self.codebook_size, noise.ctypes.data
            for step in steps:
                for seed, image in self.images:
                    fill(seed, image, step, self.codebook_size, place)
                    place += row_bytes

    return NativeNoise
