"""Writes into a bundle what a build leaves there, the content of an engine file being the name of
its graph.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.tensorrt import engine_manifest as provenance
from ssd_export.tensorrt.build_memory import shared_weights, weights_file
from ssd_export.tensorrt.in_place import in_place
from ssd_export.tensorrt.profiles import profiles_of
from ssd_export.tensorrt.target import Batch
from tests.tensorrt.trt_double import CAPABILITY, VERSION

WITH_WEIGHTS = ("prefill", "decode_step")
PLUGIN_LIBRARY = "libssd_export_plugin.so"


def write_engines(
    path: Path,
    images: tuple[int, int, int] = (1, 1, 4),
    plugin: bool = False,
    top_k: bool = False,
    flavour: str = "tensorrt-rtx",
    in_engine: bool = True,
    decoder_images: int = 2,
    **changes: Any,
) -> Bundle:
    """Adds to a bundle the files that a build leaves there, their content being the name of the
    graph.
    """
    bundle = open_bundle(path)
    prompt_slots = bundle.config.policy.prompt_slots
    graphs = [name for name in bundle.config.graphs if top_k or not name.endswith("_top_k")]
    graphs = [name for name in graphs if not (plugin and name == "evict")]
    folder = provenance.folder_name(flavour, VERSION, (CAPABILITY,))
    shared = {
        name: [w.dtype, list(w.shape), w.offset, w.num_bytes]
        for name, w in shared_weights(bundle).items()
    }
    content = {name: f"the engine of {name}".encode() for name in graphs}
    values = {
        "schema": provenance.SCHEMA,
        "flavour": flavour,
        "version": VERSION,
        "compute_capabilities": [CAPABILITY],
        "os": provenance.this_os(),
        "arch": provenance.this_arch(),
        "bundle_hash": bundle.hash,
        "batch": list(images),
        "prompt_slots": prompt_slots,
        "plugin": {
            "library": PLUGIN_LIBRARY,
            "sha256": hashlib.sha256(b"library").hexdigest(),
            "in_engine": in_engine,
        }
        if plugin
        else None,
        "weights_file": weights_file(bundle),
        "graphs": {
            name: {
                "engine": f"{name}.engine",
                "bytes": len(content[name]),
                "sha256": hashlib.sha256(content[name]).hexdigest(),
                "weights": shared if name.startswith(WITH_WEIGHTS) else {},
                "aliases": in_place(
                    bundle.config.graphs[name], plugin and name.startswith("decode_step")
                ),
                "profiles": [
                    profile.to_dict()
                    for profile in profiles_of(name, Batch(*images), prompt_slots, decoder_images)
                ],
            }
            for name in graphs
        },
    } | changes
    files = {f"{folder}/{name}.engine": data for name, data in content.items()}
    return bundle.add_files(files | {f"{folder}/{provenance.FILE}": json.dumps(values).encode()})
