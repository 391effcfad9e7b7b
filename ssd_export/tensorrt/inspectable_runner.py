"""The trt runner with open caches, for `verify`: device memory read and written between steps."""

from __future__ import annotations

import numpy as np

from ssd_export.graph_spec import CacheTensor
from ssd_export.tensorrt.runner import TrtRunner


class TrtProbe(TrtRunner):
    def part(self, layer: int, group: int, part: str) -> np.ndarray:
        values = self.cache(CacheTensor(layer, group, part))
        return (
            (values.astype(np.uint32) << 16).view(np.float32)
            if values.dtype == np.uint16
            else values
        )

    def put(self, layer: int, group: int, part: str, values: np.ndarray) -> None:
        """Values that a cache of this dtype held: a bfloat16 is the upper half of its float32."""
        name = CacheTensor(layer, group, part).past
        dtype = self._memory.buffer(name).stored_dtype
        stored = (
            (values.view(np.uint32) >> 16).astype(dtype)
            if dtype == np.uint16
            else values.astype(dtype, copy=False)
        )
        self._memory.upload(name, np.ascontiguousarray(stored))

    def force(self, step: int, tokens: np.ndarray) -> None:
        every = self._memory.download("tokens")
        every[step] = tokens
        self._memory.upload("tokens", every)
