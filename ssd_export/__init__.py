"""Janus-Pro image generation with a compressed KV cache: export a checkpoint, generate from the
bundle.

from ssd_export import ImageGenerator

with ImageGenerator.from_bundle("bundles/demo-ssd-auto-b0.2-fp32") as generator:
    generator(["a red circle on white"], seed=7).images[0].save("out.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ssd_export.version import TOOL_VERSION as __version__

if TYPE_CHECKING:
    from ssd_export.bundle import open_bundle
    from ssd_export.errors import UserError
    from ssd_export.export.exporter import ExportSpec, export_bundle
    from ssd_export.runtime.generate import GenerationCancelledError, ImageGenerator

__all__ = [
    "ExportSpec",
    "GenerationCancelledError",
    "ImageGenerator",
    "UserError",
    "__version__",
    "export_bundle",
    "open_bundle",
]
# Imported when first asked for: generating needs no torch, and asking for the version nothing at
# all.
PLACES = {
    "ExportSpec": "ssd_export.export.exporter",
    "GenerationCancelledError": "ssd_export.runtime.generate",
    "ImageGenerator": "ssd_export.runtime.generate",
    "UserError": "ssd_export.errors",
    "export_bundle": "ssd_export.export.exporter",
    "open_bundle": "ssd_export.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
