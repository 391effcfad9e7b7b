"""The kernels that TensorRT-RTX compiles for the GPU it runs on, kept beside the engines, so that
they are compiled once on a machine rather than at every start.

    engines/<folder>/runtime.cache    sha256 of the engines (32 bytes), then what TensorRT wrote

The file is code, as an engine is: it is read where the bundle's manifest has it and it was written
for these very engines. TensorRT itself refuses one of another GPU, driver or version. A cache that
will not do is compiled anew and replaced, never an error.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from ssd_export.errors import UserError
from ssd_export.tensorrt.engine_files import EngineFiles

NAME = "runtime.cache"
log = logging.getLogger(__name__)


class RuntimeCache:
    """The cache of a folder of engines; all its contexts share one."""

    def __init__(self, files: EngineFiles) -> None:
        self._files = files
        self._cache: Any = None
        self._engines = engines_digest(files)
        self._held = b""  # what TensorRT last wrote or accepted

    def give(self, config: Any) -> None:
        """Gives the cache to the configuration of a context, read when the first one asks."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Writes what was compiled since, if anything was. A bundle that cannot be written stays as
        it is.
        """
        if self._cache is None:
            return
        now = bytes(memoryview(self._cache.serialize()))
        if now == self._held:
            return
        try:
            self._files.bundle.add_files({self._name: self._engines + now})
            self._held = now
        except UserError as error:
            log.info("compiled kernels are not kept (%s): the next start compiles again", error)

    def close(self) -> None:
        """Lets go of the cache, after the contexts that use it."""
        self._cache = None

    @property
    def _name(self) -> str:
        return f"{self._files.folder}/{NAME}"

    def _read(self) -> None:
        if self._name not in self._files.bundle.files:
            return
        try:
            content = self._files.bundle.file(self._name).read_bytes()
        except (UserError, OSError) as error:
            log.info("%s is not read (%s)", self._name, error)
            return
        engines, blob = content[: len(self._engines)], content[len(self._engines) :]
        if engines != self._engines:
            log.info("%s is of other engines", self._name)
        elif self._cache.deserialize(blob):
            self._held = blob
        else:
            log.info("%s is of another GPU, driver or version", self._name)


def engines_digest(files: EngineFiles) -> bytes:
    """A hash that no other engines have."""
    entries = sorted((name, entry.sha256) for name, entry in files.manifest.graphs.items())
    return hashlib.sha256(repr(entries).encode()).digest()
