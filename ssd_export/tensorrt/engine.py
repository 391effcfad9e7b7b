"""One TensorRT engine, ready to be queued: mapped from its file, its interface checked against the
graph's contract.

The caller owns all memory that depends on the batch: buffers of inputs and outputs, and the scratch
memory that engines which never run at once can share. Names of the Python API: those of TensorRT
10.3 to 11 and TensorRT-RTX 1.7.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ssd_export.dtypes import BY_TENSORRT
from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.flavors import Flavour
from ssd_export.tensorrt.messages import logger, one_line


def open_runtime(flavour: Flavour, host_code_allowed: bool) -> Any:
    """What deserialises engines. host_code_allowed: the engine file carries the plugin's
    library.
    """
    log, _ = logger(flavour.trt)
    runtime = flavour.trt.Runtime(log)
    runtime.engine_host_code_allowed = host_code_allowed
    return runtime


class TrtEngine:
    """An engine with one context. Call order: set_sizes, scratch_bytes, use_scratch and bind, then
    enqueue.
    """

    def __init__(
        self, flavour: Flavour, runtime: Any, path: Path, spec: GraphSpec, weights: Collection[str]
    ) -> None:
        """Raises: UserError, one line, where TensorRT refuses the file or its tensors are not the
        contract's.
        """
        self.spec = spec
        self._flavour = flavour
        self._messages = logger(flavour.trt)[1]
        self._messages.clear()
        # Mapped, so that the file's pages can be dropped again: the plan never takes memory beside
        # the engine.
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            self._engine = runtime.deserialize_cuda_engine(mapped)
        if self._engine is None:
            raise UserError(
                f"TensorRT cannot load {path} ({self._reason()}); build the engines again with"
                " build-engine"
            )
        self._check_interface(path, weights)
        self._context = self._new_context()

    def set_sizes(self, dimensions: Mapping[str, int]) -> None:
        """Numbers for the inputs' named dimensions. Raises: RuntimeError for one outside the
        profile.
        """
        for tensor in self.spec.inputs:
            if any(isinstance(dimension, str) for dimension in tensor.shape):
                shape = tuple(dimensions.get(dimension, dimension) for dimension in tensor.shape)
                self._must(
                    self._context.set_input_shape(tensor.name, shape),
                    f"shape {shape} of {tensor.name}",
                )

    def scratch_bytes(self) -> int:
        """Device memory for intermediate results at the sizes set."""
        return (
            self._context.update_device_memory_size_for_shapes()
            or self._engine.device_memory_size_v2
        )

    def use_scratch(self, address: int, num_bytes: int) -> None:
        self._context.set_device_memory(address, num_bytes)

    def bind(self, name: str, address: int) -> None:
        self._must(self._context.set_tensor_address(name, address), f"the buffer of {name}")

    def enqueue(self, stream: int) -> None:
        """Queues one run; waits for nothing."""
        self._must(self._context.execute_async_v3(stream), "a run")

    def is_capturable(self, stream: int) -> bool:
        """Whether a run can be part of a CUDA graph: TensorRT-RTX says so; TensorRT has no such
        question.
        """
        return self._flavour.name != "tensorrt-rtx" or self._context.is_stream_capturable(stream)

    def _check_interface(self, path: Path, weights: Collection[str]) -> None:
        engine, trt = self._engine, self._flavour.trt
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        tensors = {tensor.name: tensor.dtype for tensor in (*self.spec.inputs, *self.spec.outputs)}
        different = names ^ {*tensors, *weights}
        for name in names & tensors.keys():
            dtype = BY_TENSORRT.get(engine.get_tensor_dtype(name).name)
            if (
                dtype is None
                or dtype.name != tensors[name]
                or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
            ):
                different.add(name)
        if different:
            raise UserError(
                f"{path} has other tensors than the bundle says"
                f" ({', '.join(sorted(different)[:3])}); build the engines again with build-engine"
            )

    def _new_context(self) -> Any:
        """Without memory of its own. TensorRT-RTX compiles kernels once shapes are known: all,
        before a capture.
        """
        trt = self._flavour.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavour.name != "tensorrt-rtx":
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            config.cuda_graph_strategy = (
                trt.CudaGraphStrategy.DISABLED
            )  # the runner captures whole grid rows itself
            context = self._engine.create_execution_context(config)
        if context is None:
            raise UserError(
                f"TensorRT cannot run {self.spec.name} here ({self._reason()}); free device memory,"
                " or use --runner ort"
            )
        return context

    def _must(self, worked: bool, what: str) -> None:
        if not worked:
            raise RuntimeError(f"TensorRT refused {what} of {self.spec.name}: {self._reason()}")

    def _reason(self) -> str:
        return one_line(self._messages.errors[-1]) if self._messages.errors else "it gave no reason"
