"""ONNX Runtime sessions: which provider, how quantized weights are multiplied, how half-precision
ones meet the CPU.

Quantized weights: ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits, which reads the
codes as they are. Its fast kernels on the CPU also round the activations, to int8 in blocks of 128
(accuracy level 4), so the tokens are not torch's; with `exact` the weights are multiplied out when
the graph is opened instead, as torch does: the same tokens, and as much memory as without
quantization. fp8 has no kernel on the CPU and is always multiplied out.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnxruntime as ort

from ssd_export.errors import UserError, first_line
from ssd_export.runtime.ort_errors import lacks_operator, open_error
from ssd_export.runtime.ort_operators import HOW_TO_BUILD, add_operators

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
GPU_HELP = (
    "--provider cuda needs a GPU and the CUDA libraries of this onnxruntime, --provider cpu needs"
    " neither"
)
# MatMulNBits with int8 activations; int8 weights, one scale a channel, get blocks so that the
# activations have them
QUANTIZED = {
    "session.qdq_matmulnbits_accuracy_level": "4",
    "session.qdq_matmulnbits_block_size": "128",
    "session.disable_qdq_constant_folding": "1",
}
MULTIPLIED_OUT = {"session.disable_quant_qdq": "1"}
# Workers of a pool spin for about 41 ms after each run, on a core that another process may need.
SPINNING = "session.intra_op.allow_spinning"
FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


def session_entries(weights: str, exact: bool) -> dict[str, str]:
    """The configuration of sessions for a bundle of that weight format."""
    if weights == "none":
        return {}
    return MULTIPLIED_OUT if exact or weights == "fp8" else QUANTIZED


def session_options(num_threads: int) -> ort.SessionOptions:
    """Options of a session with so many threads, which do not spin after a run: what runs next
    needs the cores.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if num_threads != 1:
        options.add_session_config_entry(SPINNING, "0")
    return options


def open_session(
    path: Path,
    provider: str,
    num_threads: int,
    entries: Mapping[str, str] = MappingProxyType({}),
    profile: Path | None = None,
    widen_on_use: bool = False,
    operators: Path | None = None,
) -> ort.InferenceSession:
    """A session that runs on the provider asked for.

    Args: widen_on_use: as runtime/widen_on_use.py rewrites the graph, for float16 on the CPU;
    operators: a library of operators that the graph needs.
    Raises: UserError where ONNX Runtime would fall back silently.
    """
    options = session_options(num_threads)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, f"{profile}-{path.stem}"
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    if operators is not None:
        add_operators(options, operators)
    model: str | bytes = str(path)
    if widen_on_use:
        model = _widened(path)
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(path.parent.absolute()))
        options.enable_mem_pattern = (
            False  # it would hold a second block for the widest matrix, and save no time
        )
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise UserError(
            f"this onnxruntime has no {wanted}; pip install onnxruntime-gpu, or use --provider cpu"
        )
    try:
        session = ort.InferenceSession(model, options, providers=[wanted])
    except Exception as error:  # its own classes, of no common base
        if operators is not None and lacks_operator(error):
            raise UserError(
                f"{operators} was built without an operator of {path} ({first_line(error)});"
                f" build it again: {HOW_TO_BUILD}"
            ) from error
        raise open_error(error, str(path), "" if provider == "cpu" else GPU_HELP) from error
    _give_back_freed_memory()
    if session.get_providers()[0] != wanted:
        raise UserError(f"onnxruntime could not start {wanted}; {GPU_HELP}")
    return session


def _widened(path: Path) -> bytes:
    """The graph as runtime/widen_on_use.py rewrites it. Raises: UserError where onnx_ir, which a
    board does without, is not installed, or the graph cannot be read.
    """
    try:
        from ssd_export.runtime.widen_on_use import widened_on_use
    except ImportError as error:
        raise UserError(
            "float16 weights would take more than three quarters of this machine's memory, and to"
            f" widen them one at a time onnx_ir is needed ({error}): pip install onnx-ir, or export"
            " with --weights int4, which takes less memory and runs without it"
        ) from error
    try:
        return widened_on_use(path)
    except Exception as error:  # protobuf's and onnx_ir's own, for a file that is no graph
        raise open_error(error, str(path), "") from error


def _give_back_freed_memory() -> None:
    """Opening a session frees about as much memory as it keeps (weights before they were packed);
    glibc would hold it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
