"""Translates what ONNX Runtime raises into one line with the way out that its cause has.

Its exceptions are no RuntimeErrors; their names are the status codes of its C API.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnxruntime as ort

from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError, first_line
from ssd_export.graph_spec import GraphSpec, TensorSpec

EXPORT_AGAIN = "export it again with --force, or copy it again from where it came"
OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "out of memory", "bfcarena", "bad allocation")
NO_OPERATOR = "not a registered function/op"
TOO_NEW = ("unsupported model ir version", "opset", NO_OPERATOR)
NOT_IMPLEMENTED = ("NotImplemented",)
DAMAGED = ("InvalidProtobuf", "InvalidGraph", "NoSuchFile", "InvalidArgument", "NoModel")
ELEMENT_TYPES = {  # of session.get_inputs(), where they differ from numpy's names
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}


def open_error(error: Exception, path: str, gpu_help: str) -> UserError:
    """The line for a graph that could not be opened. gpu_help: "" on the CPU."""
    reason, kind = _reason(error), type(error).__name__
    if _says(error, OUT_OF_MEMORY) or isinstance(error, MemoryError):
        return UserError(
            f"not enough memory to open {path} ({reason}); free some, or export with --weights int4"
        )
    if _says(error, TOO_NEW) or kind in NOT_IMPLEMENTED:
        return UserError(
            f"onnxruntime {ort.__version__} cannot run {path} ({reason}); pip install --upgrade"
            " onnxruntime (a GPU: onnxruntime-gpu)"
        )
    if kind in DAMAGED or not gpu_help:
        return UserError(f"onnxruntime cannot read {path} ({reason}); {EXPORT_AGAIN}")
    return UserError(f"onnxruntime could not open {path} ({reason}); {gpu_help}")


def lacks_operator(error: Exception) -> bool:
    """Whether a graph could not be opened for an operator that nobody registered."""
    return _says(error, (NO_OPERATOR,))


@contextmanager
def computing(name: str) -> Iterator[None]:
    """Turns what a graph raises while it runs into a UserError."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if _says(error, OUT_OF_MEMORY) or isinstance(error, MemoryError):
            raise UserError(
                f"not enough memory to run {name} ({reason}); generate fewer images at once with"
                " --batch, or free some"
            ) from error
        if type(error).__module__.startswith("onnxruntime"):
            raise UserError(f"onnxruntime cannot run {name} ({reason}); {EXPORT_AGAIN}") from error
        raise


def check_contract(session: ort.InferenceSession, spec: GraphSpec, path: str) -> None:
    """Raises UserError where a graph's inputs and outputs are not those of the bundle's
    configuration: the file of another graph, or of another bundle.
    """
    for kind, said, found in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        problem = _difference(said, {value.name: value for value in found})
        if problem:
            raise UserError(
                f"{path} is not the graph that ssd_config.json describes ({kind} {problem});"
                f" {EXPORT_AGAIN}"
            )


def _difference(said: Sequence[TensorSpec], found: dict[str, ort.NodeArg]) -> str:
    """The first tensor that differs, "" where none does."""
    expected = {tensor.name: tensor for tensor in said}
    for name in [*expected, *found]:
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is one too many"
        tensor, value = expected[name], found[name]
        dtype = ELEMENT_TYPES.get(value.type, value.type.removeprefix("tensor(").rstrip(")"))
        if dtype in DTYPES and dtype != tensor.dtype:
            return f"{name} is {dtype}, not {tensor.dtype}"
        fixed = [(a, b) for a, b in zip(tensor.shape, value.shape) if isinstance(b, int)]
        if len(tensor.shape) != len(value.shape) or any(
            isinstance(a, int) and a != b for a, b in fixed
        ):
            return f"{name} has shape {value.shape}, not {list(tensor.shape)}"
    return ""


def _says(error: Exception, phrases: Sequence[str]) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in phrases)


def _reason(error: Exception) -> str:
    """The first line of what it says, without the path of a source file of the library."""
    prefix = "[ONNXRuntimeError] : "
    return first_line(error, len(prefix) + 200).removeprefix(prefix)
