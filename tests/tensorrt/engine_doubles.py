"""Writes into a bundle what a build leaves there, the content of an engine file being the name of
its graph.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.tensorrt.build_memory import shared_weights, weights_file
from ssd_export.tensorrt.engine_manifest import (
    FILE,
    SCHEMA,
    EngineEntry,
    EngineManifest,
    Flags,
    PluginEntry,
    folder_name,
    this_arch,
    this_os,
)
from ssd_export.tensorrt.profiles import profiles_of
from ssd_export.tensorrt.step_form import AS_BUNDLED, KV_UPDATE, PLUGIN, engine_contract, in_place
from ssd_export.tensorrt.target import Batch
from ssd_export.typed_json import to_json
from ssd_export.version import TOOL_VERSION
from tests.tensorrt.trt_double import CAPABILITY, VERSION

WITH_WEIGHTS = ("prefill", "decode_step", "decode_window")
PLUGIN_LIBRARY = "libssd_export_plugin.so"


def write_engines(
    path: Path,
    images: tuple[int, int, int] = (1, 1, 4),
    plugin: bool = False,
    top_k: bool = False,
    flavor: str = "tensorrt-rtx",
    in_engine: bool = True,
    decoder_images: int = 2,
    form: str = KV_UPDATE,
    window: int = 0,
    fills_caches: bool = True,
    **changes: Any,
) -> Bundle:
    """Adds to a bundle the files that a build leaves there, their content being the name of the
    graph.

    Args: fills_caches: whether the prefill writes into the caches, which the bundle's own form does
    not.
    """
    bundle = open_bundle(path)
    prompt_slots = bundle.config.policy.prompt_slots
    if bundle.config.policy.kv_dtype != "model":
        form = AS_BUNDLED
    fills_caches = fills_caches and form != AS_BUNDLED
    form = PLUGIN if plugin else form
    graphs = [name for name in bundle.config.graphs if top_k or not name.endswith("_top_k")]
    graphs = [name for name in graphs if not (plugin and name == "evict")]
    graphs = [name for name in graphs if window or not name.startswith("decode_window")]
    folder = folder_name(flavor, VERSION, (CAPABILITY,))
    shared = shared_weights(bundle)
    content = {name: f"the engine of {name}".encode() for name in graphs}
    manifest = EngineManifest(
        schema=SCHEMA,
        tool_version=TOOL_VERSION,
        target="ada",
        flavor=flavor,
        version=VERSION,
        compute_capabilities=(CAPABILITY,),
        os=this_os(),
        arch=this_arch(),
        bundle_hash=bundle.hash,
        batch=images,
        prompt_slots=prompt_slots,
        workspace_mib=64,
        flags=Flags(True, False, aliased_plugin_io=plugin, host_code=plugin and in_engine),
        form=form,
        plugin=PluginEntry(PLUGIN_LIBRARY, sha256(b"library"), in_engine, 1) if plugin else None,
        weights_file=weights_file(bundle),
        graphs={
            name: EngineEntry(
                engine=f"{name}.engine",
                bytes=len(content[name]),
                sha256=sha256(content[name]),
                onnx=f"onnx/{name}.onnx",
                onnx_sha256=bundle.files[f"onnx/{name}.onnx"].sha256,
                layers={},
                profiles=profiles_of(name, Batch(*images), prompt_slots, decoder_images, window),
                aliases=in_place(
                    engine_contract(bundle.config.graphs, name, fills_caches),
                    form,
                    flavor == "tensorrt-rtx",
                ),
                weights=shared if name.startswith(WITH_WEIGHTS) else {},
                activation_bytes=None,
                seconds=1.0,
            )
            for name in graphs
        },
        warnings=(),
    )
    files = {f"{folder}/{name}.engine": data for name, data in content.items()}
    return bundle.add_files(
        files | {f"{folder}/{FILE}": to_json(replace(manifest, **changes)).encode()}
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
