"""The library of operators that ONNX Runtime is given on a CPU: where it comes from.

It is `libssd_export_operators.so` (engines/README.md): $SSD_EXPORT_OPERATORS, else build/operators
in the source tree that this package runs from. Never one in the folder where somebody happens to
stand: a library is code. Without it the ordinary operators of the bundle's decode step do the same,
but for rounding.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime as ort

from ssd_export.errors import UserError, first_line

LIBRARY = "libssd_export_operators.so"
LIBRARY_VARIABLE = "SSD_EXPORT_OPERATORS"
SOURCE_TREE = Path(__file__).parents[2]
HOW_TO_BUILD = (
    "cmake -S engines/operators -B build/operators && cmake --build build/operators, or leave out"
    f" {LIBRARY_VARIABLE} for ordinary operators"
)


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


def add_operators(options: ort.SessionOptions, library: Path) -> None:
    """Gives the library's operators to a session. Raises: UserError where it does not load."""
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's own classes, of no common base
        raise UserError(
            f"{library} does not load into onnxruntime {ort.__version__} ({first_line(error)});"
            f" build it again: {HOW_TO_BUILD}"
        ) from error
