"""engine.json: what engines were built from and for, and whether they may be loaded here.

An engine is code for one version of TensorRT and one kind of GPU; TensorRT itself says no more than
"plan file is not compatible". A loader calls `check_provenance` before it deserialises, and only
files that the manifest vouches for.

    schema, tool_version, target, flavour, version, compute_capabilities (times ten), os, arch,
    bundle_hash
    batch           [least, asked for, greatest] images of a batch
    prompt_slots    length that every prompt is padded to
    workspace_mib, flags
    plugin          null, or {"library", "sha256", "in_engine", "num_nodes"}
    weights_file    whose tensors the graphs below take as inputs
    graphs          by name: engine, bytes, sha256, onnx, onnx_sha256, seconds, layers {kind: count},
                    activation_bytes (of the profile that takes most), profiles [{"images": [least,
                    tuned for, greatest], "prompt_tokens": [...]}], disjoint in images, of which rows
                    are twice as many, aliases {output: input whose buffer it is}, weights {input:
                    [dtype, shape, offset, bytes]}
    warnings        what TensorRT said and the user saw
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError

SCHEMA = 2
FILE = "engine.json"


@dataclass(frozen=True)
class Here:
    """Where an engine is about to be loaded. compute_capability: times ten; bundle_path: for the
    message.
    """

    flavour: str
    version: str
    compute_capability: int
    os: str
    arch: str
    bundle_hash: str
    bundle_path: str


def this_os() -> str:
    return {"win32": "windows"}.get(sys.platform, sys.platform)


def this_arch() -> str:
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def folder_name(flavour: str, version: str, capabilities: tuple[int, ...]) -> str:
    """engines/<flavour><version>-sm<cc>-<os>-<arch>; several GPUs joined by +."""
    return (
        f"engines/{flavour}{version}-sm{'+'.join(map(str, capabilities))}-{this_os()}-{this_arch()}"
    )


def read_engines(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Every engine.json of a bundle, by the name of its folder. Raises: UserError for one that
    cannot be read.
    """
    names = [
        name for name in bundle.files if name.startswith("engines/") and name.endswith(f"/{FILE}")
    ]
    return {name.removesuffix(f"/{FILE}"): read_engine_json(bundle, name) for name in names}


def read_engine_json(bundle: Bundle, name: str) -> dict[str, Any]:
    try:
        values = json.loads(bundle.file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("schema"), int):
        raise UserError(f"{bundle.path / name} is damaged; {rebuild(str(bundle.path))}")
    return values


def check_provenance(engine_json: Mapping[str, Any], here: Here) -> None:
    """Returns if engines of this engine.json can be loaded here.

    Raises: UserError, one line with the command that builds a fitting one, for another schema,
    flavour, version, GPU, system or bundle.
    """
    again = rebuild(here.bundle_path)
    if engine_json["schema"] != SCHEMA:
        raise UserError(
            f"engine.json has schema {engine_json['schema']} and this version reads {SCHEMA};"
            f" {again}"
        )
    built = f"{engine_json['flavour']} {engine_json['version']}"
    if built != f"{here.flavour} {here.version}":
        raise UserError(
            f"the engine was built with {built} and {here.flavour} {here.version} is here; {again}"
        )
    if here.compute_capability not in engine_json["compute_capabilities"]:
        wanted = ", ".join(
            f"{capability / 10:.1f}" for capability in engine_json["compute_capabilities"]
        )
        raise UserError(
            f"the engine is for GPUs of compute capability {wanted} and this one has "
            f"{here.compute_capability / 10:.1f}; {again}"
        )
    if (engine_json["os"], engine_json["arch"]) != (here.os, here.arch):
        raise UserError(
            f"the engine is for {engine_json['os']} {engine_json['arch']} and this is {here.os}"
            f" {here.arch}; {again}"
        )
    if engine_json["bundle_hash"] != here.bundle_hash:
        raise UserError(
            f"the engine was built from another bundle than {here.bundle_path}; {again}"
        )


def check_batch(engine_json: Mapping[str, Any], num_images: int, bundle_path: str) -> None:
    """Raises: UserError, with the command that builds a fitting one, for a batch outside the
    engine's profile.
    """
    least, usual, most = engine_json["batch"]
    if not least <= num_images <= most:
        wider = f"{min(least, num_images)}:{usual}:{max(most, num_images)}"
        raise UserError(
            f"the engine draws {least} to {most} images at once, not {num_images}; "
            f"{rebuild(bundle_path)} --batch {wider}"
        )


def rebuild(bundle_path: str) -> str:
    """The advice that ends every refusal."""
    return f"build it here: ssd-export build-engine --bundle {bundle_path}"
