"""The bundle: one folder that every runtime reads, whole or absent."""

from __future__ import annotations

from ssd_export.bundle.bundle import CHECKING, Bundle, open_bundle
from ssd_export.bundle.config import (
    CONFIG,
    SCHEMA_VERSION,
    BundleConfig,
    GenerationDefaults,
    Precision,
    TextEmbeddingTable,
    write_config,
)
from ssd_export.bundle.config_reader import read_config
from ssd_export.bundle.latest import latest_bundle, remember_latest, resolve_bundle
from ssd_export.bundle.manifest import MANIFEST, FileEntry
from ssd_export.bundle.write import JOURNAL, check_target, write_bundle

__all__ = [
    "CHECKING",
    "CONFIG",
    "JOURNAL",
    "MANIFEST",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleConfig",
    "FileEntry",
    "GenerationDefaults",
    "Precision",
    "TextEmbeddingTable",
    "check_target",
    "latest_bundle",
    "open_bundle",
    "read_config",
    "remember_latest",
    "resolve_bundle",
    "write_bundle",
    "write_config",
]
