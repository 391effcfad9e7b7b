"""TensorRT as a double that executes: engines are the bundle's ONNX graphs, run by ONNX Runtime on
the memory of the CUDA double. Every run checks what TensorRT leaves to the caller: all addresses
set and aligned, outputs that engine.json aliases at the address of their input, no other overlap,
enough scratch memory (whose content is destroyed), weights as in their file. Every call and every
destruction wants the device's context current in its thread, and nothing may outlive what it was
made on (`CudaDouble.alive`).
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from ssd_export.bundle import open_bundle
from ssd_export.graph_spec import TensorSpec
from ssd_export.runtime.ort_session import open_session, session_entries
from ssd_export.tensorrt import engine_manifest as provenance
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.kv_update import kv_update_graph
from ssd_export.tensorrt.step_form import KV_UPDATE, engine_contract, engine_spec, fills_caches
from tests.tensorrt.cuda_double import CudaDouble

VERSION, CAPABILITY = "1.7.1.116", 89
NAMES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
    "int8": "INT8",
}


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class TensorLocation(Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DataType(Enum):
    FLOAT, HALF, BF16, INT32, INT64, INT8 = range(6)


WITH_KV_UPDATE = Flavor(
    "a double", VERSION, SimpleNamespace(INetworkDefinition=SimpleNamespace(add_kv_cache_update=1))
)


class TrtDouble:
    """Stands for the module tensorrt_rtx, or tensorrt without is_rtx. contents: graph by an engine
    file's bytes.
    """

    ILogger, TensorLocation, DataType = ILogger, TensorLocation, DataType
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, cuda: CudaDouble, path: Path, is_rtx: bool = True) -> None:
        self.cuda, self.is_rtx = cuda, is_rtx
        self.bundle = open_bundle(path)
        (self.engines,) = provenance.read_engines(self.bundle).values()
        self.contents = {
            self.bundle.file(f"{folder}/{entry.engine}").read_bytes(): name
            for folder in provenance.read_engines(self.bundle)
            for name, entry in self.engines.graphs.items()
        }
        self.weights = np.fromfile(self.bundle.file(self.engines.weights_file), np.uint8)
        self.runs: list[str] = []
        self.compiled: list[str] = []  # contexts whose kernels no cache had
        self.environment = b"one GPU, one driver"

    @property
    def flavor(self) -> Flavor:
        return Flavor("tensorrt-rtx" if self.is_rtx else "tensorrt", VERSION, self)

    def Runtime(self, log: ILogger) -> RuntimeDouble:
        return RuntimeDouble(self, log)


class OnDevice:
    """Something of TensorRT's that lives on the device until Python lets go of it."""

    def __init__(self, trt: TrtDouble, what: str) -> None:
        self._trt, self._what = trt, what
        self._check()
        trt.cuda.alive.append(what)

    def _check(self) -> None:
        assert self._trt.cuda.is_current, f"{self._what}: no context is current in this thread"

    def __del__(self) -> None:
        if "_what" in vars(self) and self._what in self._trt.cuda.alive:
            self._trt.cuda.alive.remove(self._what)
            if not self._trt.cuda.is_current:
                self._trt.cuda.faults.append(f"{self._what} destroyed without a context")


class RuntimeDouble(OnDevice):
    engine_host_code_allowed = False

    def __init__(self, trt: TrtDouble, log: ILogger) -> None:
        super().__init__(trt, "runtime")
        self._log = log

    def deserialize_cuda_engine(self, serialized_engine: Any) -> EngineDouble | None:
        self._check()
        plugin = self._trt.engines.plugin
        graph = self._trt.contents.get(bytes(serialized_engine))
        if graph is None or (plugin and plugin.in_engine and not self.engine_host_code_allowed):
            self._log.log(
                Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 6:\nno such engine"
            )
            return None
        return EngineDouble(self, graph)


class RuntimeCacheDouble(OnDevice):
    """Names of the contexts whose kernels are compiled."""

    def __init__(self, trt: TrtDouble) -> None:
        super().__init__(trt, "runtime cache")
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        self._check()
        environment, _, names = blob.partition(b":")
        if environment == self._trt.environment:
            self.kernels = set(filter(None, names.decode().split(",")))
        return environment == self._trt.environment

    def serialize(self) -> bytes:
        self._check()
        return self._trt.environment + b":" + ",".join(sorted(self.kernels)).encode()


class RuntimeConfigDouble:
    dynamic_shapes_kernel_specialization_strategy = cuda_graph_strategy = strategy = None

    def __init__(self, trt: TrtDouble) -> None:
        self._trt, self.cache = trt, None

    def create_runtime_cache(self) -> RuntimeCacheDouble:
        return RuntimeCacheDouble(self._trt)

    def set_runtime_cache(self, cache: RuntimeCacheDouble) -> bool:
        cache._check()
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy


class EngineDouble(OnDevice):
    def __init__(self, runtime: RuntimeDouble, graph: str) -> None:
        super().__init__(runtime._trt, f"engine of {graph}")
        self.runtime, self.trt, self.graph = runtime, runtime._trt, graph
        entry = self.trt.engines.graphs[graph]
        self.profiles, self.aliases = entry.profiles, entry.aliases
        contracts = self.trt.bundle.config.graphs
        self.spec = engine_contract(contracts, graph, is_in_place=bool(self.aliases))
        self.shaped = engine_spec(self.spec, self.trt.engines.form)
        self.weights = {
            name: TensorSpec(name, weight.dtype, weight.shape)
            for name, weight in entry.weights.items()
        }
        self.tensors = {
            t.name: t for t in (*self.shaped.inputs, *self.shaped.outputs, *self.weights.values())
        }
        self.used_profiles: set[int] = set()

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return 1 << 20

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[NAMES[self.tensors[name].dtype]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self.tensors[name].shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """What the KV-cache-update layer declares."""
        has_layer = self.trt.engines.form == KV_UPDATE or fills_caches(self.spec)
        return self.aliases.get(name) if has_layer else None

    def create_runtime_config(self) -> RuntimeConfigDouble:
        assert self.trt.is_rtx, "TensorRT 10.3 has no runtime configuration"
        return RuntimeConfigDouble(self.trt)

    def create_execution_context(
        self, how: RuntimeConfigDouble | ExecutionContextAllocationStrategy
    ) -> ContextDouble:
        self._check()
        strategy = how.strategy if isinstance(how, RuntimeConfigDouble) else how
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if self.trt.is_rtx:
            assert (
                how.dynamic_shapes_kernel_specialization_strategy
                is DynamicShapesKernelSpecializationStrategy.EAGER
            )
            assert how.cuda_graph_strategy is CudaGraphStrategy.DISABLED
            assert how.cache is not None, "kernels are compiled at every start"
            if self.graph not in how.cache.kernels:
                self.trt.compiled.append(self.graph)
                how.cache.kernels.add(self.graph)
        return ContextDouble(self)


class ContextDouble(OnDevice):
    def __init__(self, engine: EngineDouble) -> None:
        super().__init__(engine.trt, f"context of {engine.graph}")
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._ran_with: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._check()
        if profile_index >= len(self._engine.profiles):
            return False
        assert profile_index not in self._engine.used_profiles, "two contexts with one profile"
        self._engine.used_profiles.add(profile_index)
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._check()
        wanted = self._engine.tensors[name].shape
        profile = self._engine.profiles[self._profile]
        rows = self._engine.trt.bundle.config.model.rows_per_image
        for size, dimension in zip(shape, wanted, strict=True):
            least, _, most = profile.sizes(dimension, rows)
            if not least <= size <= most:
                return False
        self._shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        """Odd on purpose; none for the evict graph, where the real call's 0 can also mean an
        error.
        """
        self._check()
        assert self._unset() == []
        return (
            0
            if self._engine.graph == "evict"
            else 1003 * max(shape[0] for shape in self._shapes.values())
        )

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= self.update_device_memory_size_for_shapes()
        self._scratch = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine.tensors and memory % 256 == 0

    def is_stream_capturable(self, stream: int) -> bool:
        self._check()
        assert self._trt.is_rtx
        return self._ran_with == self._shapes

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._check()
        assert not self._unset()
        capturing = self._trt.cuda.is_capturing(stream_handle)
        assert not capturing or self._ran_with == self._shapes, (
            "captured before a first run at these shapes"
        )
        self._ran_with = dict(self._shapes)
        views = self._views()
        self._trt.cuda.queue(stream_handle, lambda: self._run(views))
        return True

    def _unset(self) -> list[str]:
        return [
            t.name
            for t in self._engine.spec.inputs
            if any(isinstance(d, str) for d in t.shape) and t.name not in self._shapes
        ]

    def _views(self) -> dict[str, np.ndarray]:
        """The memory of every tensor, as it is bound now, with all checks."""
        engine, sizes = self._engine, {}
        for name, shape in self._shapes.items():
            sizes.update(
                {
                    d: n
                    for d, n in zip(engine.tensors[name].shape, shape, strict=True)
                    if isinstance(d, str)
                }
            )
        assert engine.tensors.keys() == self._addresses.keys(), "a tensor has no address"
        views = {}
        for name, tensor in engine.tensors.items():
            shape = tuple(sizes.get(dimension, dimension) for dimension in tensor.shape)
            size = prod(shape) * np.dtype(tensor.dtype).itemsize
            views[name] = (
                self._trt.cuda.memory(self._addresses[name], size).view(tensor.dtype).reshape(shape)
            )
        for output, past in engine.aliases.items():
            assert self._addresses[output] == self._addresses[past], f"{output} is not in place"
        self._check_overlaps(
            {name: view for name, view in views.items() if name not in engine.aliases}
        )
        for name, weight in self._trt.engines.graphs[engine.graph].weights.items():
            stored = self._trt.weights[weight.offset : weight.offset + weight.num_bytes]
            assert (views[name].reshape(-1).view(np.uint8) == stored).all(), name
        return views

    def _check_overlaps(self, views: dict[str, np.ndarray]) -> None:
        spans = sorted(
            [(v.ctypes.data, v.ctypes.data + v.nbytes, name) for name, v in views.items()]
            + [(self._scratch[0], sum(self._scratch), "scratch memory")]
        )
        for (_, end, first), (start, _, second) in zip(spans, spans[1:], strict=False):
            assert end <= start, f"{first} and {second} overlap in {self._engine.graph}"

    def _run(self, views: dict[str, np.ndarray]) -> None:
        spec, graph = self._engine.spec, self._engine.graph
        self._trt.runs.append(graph)
        self._trt.cuda.memory(*self._scratch).fill(0xCD)
        given = {tensor.name: views[tensor.name] for tensor in spec.inputs}
        if self._trt.engines.plugin and "evict" in self._trt.bundle.config.graphs:
            if graph.startswith("decode_step"):
                given |= self._evicted(given, given["step"])
            elif graph.startswith("decode_window"):
                given |= self._evicted_by_image(given)
        outputs = [tensor.name for tensor in spec.outputs]
        for name, values in zip(outputs, self._session(graph).run(outputs, given), strict=True):
            views[name][:] = values
        self._trt.cuda.memory(*self._scratch).fill(0xCD)

    def _evicted_by_image(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same in the rows of images that do not rest, each before its own step."""
        evicted: dict[str, np.ndarray] = {}
        for image, (first, limit) in enumerate(zip(given["first"], given["limit"], strict=True)):
            if limit:
                for name, values in self._evicted(given, first[None]).items():
                    own = evicted.setdefault(name, given[name].copy())
                    own[image :: len(given["first"])] = values[image :: len(given["first"])]
        return evicted

    def _evicted(self, given: dict[str, np.ndarray], step: np.ndarray) -> dict[str, np.ndarray]:
        """What the plugin does before it writes: heads without an empty slot evict (R7)."""
        spec = self._trt.bundle.config.graphs["evict"]
        outputs = [tensor.name for tensor in spec.outputs]
        given = given | {"step": step}
        feeds = {tensor.name: given[tensor.name] for tensor in spec.inputs}
        values = self._session("evict").run(outputs, feeds)
        return {
            name.replace("present", "past_key_values"): array
            for name, array in zip(outputs, values, strict=True)
        }

    def _session(self, graph: str) -> ort.InferenceSession:
        bundle = self._trt.bundle
        path = bundle.file(f"onnx/{graph}.onnx")
        is_step = self._trt.engines.form == KV_UPDATE and graph.startswith("decode_step")
        if is_step or (graph == self._engine.graph and fills_caches(self._engine.spec)):
            path = path.with_name(f"{graph}.kv_update.onnx")
            if not path.exists():
                path.write_bytes(kv_update_graph(bundle, graph, WITH_KV_UPDATE))
        return session(path, bundle.config.precision.weights)


@lru_cache(maxsize=32)
def session(path: Path, weights: str) -> ort.InferenceSession:
    """Quantized weights multiplied out, as TensorRT computes with them."""
    return open_session(path, "cpu", 1, session_entries(weights, exact=True))
