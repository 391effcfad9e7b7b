"""The engines of a bundle on the device, each loaded when first asked for; the weights they share
are there once.
"""

from __future__ import annotations

import mmap
from contextlib import ExitStack
from typing import Any

import numpy as np

from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.device_buffers import WAYS_OUT, check_device_memory, place_weights
from ssd_export.tensorrt.engine import TrtContext, TrtEngine, open_runtime
from ssd_export.tensorrt.engine_files import EngineFiles
from ssd_export.tensorrt.profiles import profile_for
from ssd_export.tensorrt.runtime_cache import RuntimeCache
from ssd_export.tensorrt.step_form import DECODE_WINDOW, engine_contract, engine_spec


class LoadedEngines:
    """Loaded engines by the names of their graphs.

    Raises: UserError where weights and engines will not fit, before anything is loaded.
    """

    def __init__(self, files: EngineFiles, specs: dict[str, GraphSpec], device: CudaDevice) -> None:
        self._files, self._specs, self._device = files, specs, device
        self._runtime: Any = None
        self._cache = RuntimeCache(files)
        self._engines: dict[str, TrtEngine] = {}
        self._contexts: dict[tuple[str, int], TrtContext] = {}
        self._memory = 0
        with ExitStack() as undo:
            undo.callback(self.close)
            self._open()
            undo.pop_all()

    def _open(self) -> None:
        """Opens the runtime and brings the weights to the device."""
        files, device = self._files, self._device
        device.use()
        self._runtime = open_runtime(files.flavor, files.register_plugin())
        weights = files.all_weights()
        offsets, self.weight_bytes = place_weights(
            {name: weight.num_bytes for name, weight in weights.items()}
        )
        always = files.num_bytes(
            name
            for name in self._specs
            if not name.endswith("_top_k") and not name.startswith(DECODE_WINDOW)
        )
        check_device_memory(
            "the model", self.weight_bytes + always, device.memory_bytes()[0], WAYS_OUT
        )
        self._memory = device.allocate(max(self.weight_bytes, 1))
        self._addresses = {name: self._memory + offset for name, offset in offsets.items()}
        self._upload_weights()

    def context(self, graph: str, num_images: int) -> TrtContext:
        """The context of a graph's engine that takes this many images, weights bound.

        Raises: UserError where there is no such engine, TensorRT refuses it or it is not tuned for
        the number.
        """
        engine = self._engine(graph)
        profile = profile_for(self._files.profiles(graph), num_images)
        if profile is None:
            raise UserError(
                f"the engine of {graph} has no profile for {num_images} images;"
                f" {self._files.rebuild}"
            )
        if (graph, profile) not in self._contexts:
            context = engine.context(profile)
            for weight in self._files.weights(graph):
                context.bind(weight, self._addresses[weight])
            self._contexts[graph, profile] = context
        return self._contexts[graph, profile]

    @property
    def file_bytes(self) -> int:
        """Bytes of the files of the engines that are loaded."""
        return self._files.num_bytes(self._engines)

    def close(self) -> None:
        """Destroys contexts, engines and the runtime, in this order, then frees the weights."""
        with ExitStack() as last_first:
            if self._memory:
                last_first.callback(self._device.free, self._memory)
            last_first.callback(self._close_runtime)
            last_first.callback(self._close_cache)
            for engine in self._engines.values():
                last_first.callback(engine.close)
            for context in self._contexts.values():
                last_first.callback(context.close)
            last_first.callback(self._keep_cache)
            self._engines, self._contexts, self._memory = {}, {}, 0

    def _keep_cache(self) -> None:
        self._device.use()
        self._cache.keep()

    def _close_cache(self) -> None:
        self._device.use()
        self._cache.close()

    def _close_runtime(self) -> None:
        self._device.use()
        self._runtime = None

    def _engine(self, graph: str) -> TrtEngine:
        if graph not in self._engines:
            files = self._files
            contract = engine_contract(self._specs, graph, files.fills_caches(graph))
            self._engines[graph] = TrtEngine(
                files.flavor,
                self._deserialize,
                self._device,
                files.path(graph),
                contract,
                engine_spec(contract, files.form),
                files.weights(graph),
                files.aliases(graph),
                self._cache.give,
            )
        return self._engines[graph]

    def _deserialize(self, data: mmap.mmap) -> Any:
        return self._runtime.deserialize_cuda_engine(data)

    def _upload_weights(self) -> None:
        stored = np.memmap(self._files.weights_path, np.uint8, "r")
        for name, weight in self._files.all_weights().items():
            end = weight.offset + weight.num_bytes
            if end > len(stored):
                raise UserError(
                    f"{self._files.weights_path} ends before {name}; {self._files.rebuild}"
                )
            self._device.upload(self._addresses[name], stored[weight.offset : end])
        self._device.synchronize()
