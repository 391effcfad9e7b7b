"""One TensorRT engine and its contexts, ready to be queued: mapped from its file, its interface
checked against the graph's contract.

The caller owns all memory that depends on the batch: buffers of inputs and outputs, and the scratch
memory that engines which never run at once can share. Every call first makes the device's context
current, since images may be generated from any thread. Names of the Python API: those of TensorRT
10.3 to 11 and TensorRT-RTX 1.7.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.plan.sizes import StoredWeight
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.messages import logger, one_line
from ssd_export.tensorrt.step_form import size_of

log = logging.getLogger(__name__)


def open_runtime(flavor: Flavor, host_code_allowed: bool) -> Any:
    """Opens the runtime that deserializes engines. host_code_allowed: the engine file carries the
    plugin's library.
    """
    log, _ = logger(flavor.trt)
    runtime = flavor.trt.Runtime(log)
    runtime.engine_host_code_allowed = host_code_allowed
    return runtime


class TrtEngine:
    """A deserialized engine.

    Args: deserialize: makes it of its file's bytes; spec: the graph's contract; shaped: the same
    with the engine's shapes; aliases: output -> the input whose memory it is; give_cache: gives a
    context's configuration the compiled kernels (TensorRT-RTX alone has them).
    """

    def __init__(
        self,
        flavor: Flavor,
        deserialize: Callable[[mmap.mmap], Any],
        device: CudaDevice,
        path: Path,
        spec: GraphSpec,
        shaped: GraphSpec,
        weights: Mapping[str, StoredWeight],
        aliases: Mapping[str, str],
        give_cache: Callable[[Any], None] = lambda config: None,
    ) -> None:
        """Raises UserError, one line, where TensorRT refuses the file or its tensors are not the
        contract's.
        """
        self.spec, self.shaped, self.aliases = spec, shaped, dict(aliases)
        self._flavor, self._device, self._give_cache = flavor, device, give_cache
        self._messages = logger(flavor.trt)[1]
        self._said = self._messages.mark()
        device.use()
        # Mapped, so that the file's pages can be dropped again: the plan never takes memory beside
        # the engine.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            self._engine = deserialize(mapped)
        if self._engine is None:
            raise UserError(
                f"TensorRT cannot load {path} ({self.reason()}); build the engines again with"
                " build-engine"
            )
        self._tell_warnings()
        different = self._different_tensors(weights)
        if different:
            self._engine = None  # not to live on with the error
            raise UserError(
                f"{path} has other tensors than the bundle says ({', '.join(different[:3])});"
                " build the engines again with build-engine"
            )

    def context(self, profile: int = 0) -> TrtContext:
        """A context for the sizes of one profile; each has one at most.

        Raises: UserError where the device has no memory for it.
        """
        return TrtContext(self, profile)

    def new_context(self) -> Any:
        """TensorRT's own, without memory. TensorRT-RTX compiles kernels once shapes are known: all,
        before a capture.
        """
        trt = self._flavor.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        how = strategy
        if self._flavor.name == "tensorrt-rtx":
            how = self._engine.create_runtime_config()
            how.set_execution_context_allocation_strategy(strategy)
            how.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            how.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the runner captures itself
            self._give_cache(how)
        context = self.call(lambda: self._engine.create_execution_context(how))
        if context is None:
            raise UserError(
                f"TensorRT cannot run {self.spec.name} here ({self.reason()}); free device memory,"
                " or use --runner ort"
            )
        self._tell_warnings()
        return context

    @property
    def scratch_bytes(self) -> int:
        """Device memory for intermediate results at the greatest sizes of all profiles."""
        return self._engine.device_memory_size_v2

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream that all work is queued on."""
        return self._device.stream

    @property
    def tells_if_capturable(self) -> bool:
        """TensorRT-RTX says whether a run can be captured; TensorRT has no such question."""
        return self._flavor.name == "tensorrt-rtx"

    def call(self, work: Callable[[], Any]) -> Any:
        """The result of a call of TensorRT's, on the device; `reason` then is what it said."""
        self._device.use()
        self._said = self._messages.mark()
        return work()

    def reason(self) -> str:
        """The messages of TensorRT during the last call of this engine, on one line."""
        said = self._messages.errors_since(self._said)
        return one_line(said[-1]) if said else "it gave no reason"

    def _tell_warnings(self) -> None:
        """Hands on what TensorRT warns of, say an engine that was tuned for another GPU."""
        for warning in self._messages.take_warnings():
            log.warning("%s: %s", self.spec.name, warning)

    def close(self) -> None:
        """Destroys the engine, after its contexts."""
        self._device.use()
        self._engine = None

    def _different_tensors(self, weights: Mapping[str, StoredWeight]) -> list[str]:
        """Names that the engine and its contract do not share, or share with another dtype; weights
        of another shape or dtype than are stored; outputs over memory that is not theirs.
        """
        engine, device = self._engine, self._flavor.trt.TensorLocation.DEVICE
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        tensors = {tensor.name: tensor.dtype for tensor in (*self.spec.inputs, *self.spec.outputs)}
        unlike = {
            name
            for name in names & tensors.keys()
            if DTYPES[tensors[name]].tensorrt != engine.get_tensor_dtype(name).name
            or engine.get_tensor_location(name) != device
        }
        unlike |= {
            name
            for name, weight in weights.items()
            if name in names
            and (DTYPES[weight.dtype].tensorrt, weight.shape)
            != (engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name)))
        }
        return sorted(names ^ {*tensors, *weights} | unlike | self._wrong_aliases(names))

    def _wrong_aliases(self, names: Collection[str]) -> set[str]:
        """Outputs that engine.json lays over an input that is not like them, or that the engine
        writes over another one: TensorRT tells this from 10.15 on, and TensorRT-RTX.
        """
        inputs, outputs = (
            {tensor.name: (tensor.dtype, tensor.shape) for tensor in side}
            for side in (self.shaped.inputs, self.shaped.outputs)
        )
        unlike = {
            output
            for output, past in self.aliases.items()
            if output not in outputs or outputs[output] != inputs.get(past)
        }
        declared = getattr(self._engine, "get_aliased_input_tensor", lambda name: None)
        others = {
            name for name in names if declared(name) not in (None, "", self.aliases.get(name))
        }
        return unlike | others


class TrtContext:
    """An engine at the sizes of one profile. Call order: set_sizes, scratch_bytes, use_scratch and
    bind, then enqueue.
    """

    def __init__(self, engine: TrtEngine, profile: int) -> None:
        self.spec, self.aliases = engine.spec, engine.aliases
        self.name = f"{engine.spec.name}.{profile}"  # of the context, an engine may have several
        self._engine = engine
        self._context = engine.new_context()
        self._must(
            lambda: self._context.set_optimization_profile_async(profile, engine.stream),
            f"profile {profile}",
        )

    def set_sizes(self, dimensions: Mapping[str, int]) -> None:
        """Numbers for the inputs' named dimensions. Raises: RuntimeError for one outside the
        profile.
        """
        for tensor in self._engine.shaped.inputs:
            if any(isinstance(dimension, str) for dimension in tensor.shape):
                shape = tuple(size_of(dimension, dimensions) for dimension in tensor.shape)
                self._must(
                    partial(self._context.set_input_shape, tensor.name, shape),
                    f"shape {shape} of {tensor.name}",
                )

    def scratch_bytes(self) -> int:
        """Device memory for intermediate results at the sizes set."""
        needed = self._engine.call(self._context.update_device_memory_size_for_shapes)
        return needed or self._engine.scratch_bytes

    def use_scratch(self, address: int, num_bytes: int) -> None:
        """Gives the context its activations' memory."""
        self._engine.call(lambda: self._context.set_device_memory(address, num_bytes))

    def bind(self, name: str, address: int) -> None:
        """Binds an input or output to a device address. Raises: UserError where TensorRT
        refuses.
        """
        self._must(lambda: self._context.set_tensor_address(name, address), f"the buffer of {name}")

    def enqueue(self) -> None:
        """Queues one run on the device's stream; waits for nothing."""
        self._must(lambda: self._context.execute_async_v3(self._engine.stream), "a run")

    def is_capturable(self) -> bool:
        """Whether a run can be part of a CUDA graph, as far as TensorRT knows."""
        if not self._engine.tells_if_capturable:
            return True
        return self._engine.call(lambda: self._context.is_stream_capturable(self._engine.stream))

    def close(self) -> None:
        """Destroys the context."""
        self._engine.call(lambda: None)
        self._context = None

    def _must(self, work: Callable[[], bool], what: str) -> None:
        if not self._engine.call(work):
            raise RuntimeError(
                f"TensorRT refused {what} of {self.spec.name}: {self._engine.reason()}"
            )
