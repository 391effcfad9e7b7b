"""The engines of a bundle on the device, each loaded when first asked for; the weights they share
are there once.
"""

from __future__ import annotations

import numpy as np

from ssd_export.errors import UserError
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.cuda_device import CudaDevice
from ssd_export.tensorrt.device_buffers import WAYS_OUT, check_device_memory, place_weights
from ssd_export.tensorrt.engine import TrtEngine, open_runtime
from ssd_export.tensorrt.engine_files import EngineFiles


class LoadedEngines:
    """By the names of their graphs.

    Raises: UserError where weights and engines will not fit, before anything is loaded.
    """

    def __init__(self, files: EngineFiles, specs: dict[str, GraphSpec], device: CudaDevice) -> None:
        self._files, self._specs, self._device = files, specs, device
        self._runtime = open_runtime(files.flavour, files.register_plugin())
        self._engines: dict[str, TrtEngine] = {}
        weights = files.all_weights()
        offsets, self.weight_bytes = place_weights(
            {name: weight.num_bytes for name, weight in weights.items()}
        )
        always = files.num_bytes(name for name in specs if not name.endswith("_top_k"))
        check_device_memory(
            "the model", self.weight_bytes + always, device.memory_bytes()[0], WAYS_OUT
        )
        self._memory = device.allocate(max(self.weight_bytes, 1))
        self._addresses = {name: self._memory + offset for name, offset in offsets.items()}
        self._upload_weights()

    def __getitem__(self, name: str) -> TrtEngine:
        """Loaded, its weights bound. Raises: UserError where there is no such engine or TensorRT
        refuses it.
        """
        if name not in self._engines:
            path, weights = self._files.path(name), self._files.weights(name)
            engine = TrtEngine(self._files.flavour, self._runtime, path, self._specs[name], weights)
            for weight in weights:
                engine.bind(weight, self._addresses[weight])
            self._engines[name] = engine
        return self._engines[name]

    @property
    def file_bytes(self) -> int:
        """Of the engines that are loaded."""
        return self._files.num_bytes(self._engines)

    def close(self) -> None:
        self._engines = {}
        if self._memory:
            self._device.free(self._memory)
        self._memory = 0

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
