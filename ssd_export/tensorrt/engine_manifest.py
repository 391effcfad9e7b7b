"""The engine.json of built engines: what they were built from and for, and whether they may be
loaded here.

An engine is code for one version of TensorRT and one kind of GPU; TensorRT itself says no more than
"plan file is not compatible". A loader calls `check_provenance` before it deserializes, and only
files that the manifest names. A fault of one folder of engines concerns that folder alone.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from ssd_export.bundle import Bundle
from ssd_export.dtypes import DTYPES
from ssd_export.errors import UserError
from ssd_export.plan.sizes import StoredWeight
from ssd_export.policy.table import MAX_LOOKAHEAD
from ssd_export.tensorrt.profiles import Bounds, Profile
from ssd_export.tensorrt.step_form import DECODE_WINDOW, Form
from ssd_export.typed_json import parse_json, wrong_value

SCHEMA = 3
FILE = "engine.json"
MAX_IMAGES = 1 << 16  # of a batch; the largest profiles have 128
MAX_PROMPT_TOKENS = 1 << 24  # as a bundle's positions


@dataclass(frozen=True)
class Flags:
    """Options that the engines were built with."""

    strongly_typed: bool
    tf32: bool
    aliased_plugin_io: bool
    host_code: bool


@dataclass(frozen=True)
class PluginEntry:
    """The plugin of the decode steps.

    library, sha256: None where the caller registered the plugin by itself; in_engine: the engine
    file carries the library; num_nodes: one for each layer.
    """

    library: str | None
    sha256: str | None
    in_engine: bool
    num_nodes: int


@dataclass(frozen=True)
class EngineEntry:
    """One engine.

    engine: the file's name in the folder; onnx: the graph's in the bundle; layers: {kind: count};
    profiles: disjoint in images; aliases: {output: input whose buffer it is}; weights: where the
    inputs that never change stand in the weights file; activation_bytes: of the profile that takes
    most, None where the builder did not say.
    """

    engine: str
    bytes: int
    sha256: str
    onnx: str
    onnx_sha256: str
    layers: dict[str, int]
    profiles: tuple[Profile, ...]
    aliases: dict[str, str]
    weights: dict[str, StoredWeight]
    activation_bytes: int | None
    seconds: float


@dataclass(frozen=True)
class EngineManifest:
    """The content of engine.json.

    compute_capabilities: times ten; batch: images generated at once, least, asked for, greatest;
    prompt_slots: length that every prompt is padded to; form: of the decode step's attention
    (step_form.py); weights_file: whose tensors the engines take
    as inputs; warnings: what TensorRT said and the user saw.
    """

    schema: int
    tool_version: str
    target: str
    flavor: str
    version: str
    compute_capabilities: tuple[int, ...]
    os: str
    arch: str
    bundle_hash: str
    batch: Bounds
    prompt_slots: int
    workspace_mib: int
    flags: Flags
    form: Form
    plugin: PluginEntry | None
    weights_file: str
    graphs: dict[str, EngineEntry]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Schema:
    schema: int


@dataclass(frozen=True)
class Here:
    """The machine on which an engine is about to be loaded. compute_capability: times ten;
    bundle_path: for the message.
    """

    flavor: str
    version: str
    compute_capability: int
    os: str
    arch: str
    bundle_hash: str
    bundle_path: str


def this_os() -> str:
    """The operating system, as engine.json names it."""
    return {"win32": "windows"}.get(sys.platform, sys.platform)


def this_arch() -> str:
    """The processor architecture, as engine.json names it."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def folder_name(flavor: str, version: str, capabilities: tuple[int, ...]) -> str:
    """engines/<flavor><version>-sm<cc>-<os>-<arch>; several GPUs joined by +."""
    return (
        f"engines/{flavor}{version}-sm{'+'.join(map(str, capabilities))}-{this_os()}-{this_arch()}"
    )


def engine_folders(bundle: Bundle) -> list[str]:
    """The folders of engines in a bundle, whatever is in them."""
    return [
        name.removesuffix(f"/{FILE}")
        for name in bundle.files
        if name.startswith("engines/") and name.endswith(f"/{FILE}")
    ]


def read_engines(bundle: Bundle) -> dict[str, EngineManifest]:
    """Every engine.json of a bundle, by the name of its folder. Raises: UserError for one that
    cannot be read.
    """
    return {folder: read_engine_json(bundle, folder) for folder in engine_folders(bundle)}


def read_engine_json(bundle: Bundle, folder: str) -> EngineManifest:
    """The checked engine.json of a folder of engines. Raises: UserError, with the command that
    builds them again.
    """
    source, again = str(bundle.path / folder / FILE), rebuild(str(bundle.path))
    content = bundle.read(f"{folder}/{FILE}")
    schema = parse_json(content, _Schema, source, again).schema
    if schema != SCHEMA:
        raise UserError(f"{source} has schema {schema} and this version reads {SCHEMA}; {again}")
    manifest = parse_json(content, EngineManifest, source, again)
    _check(manifest, source, again)
    return manifest


def _check(manifest: EngineManifest, source: str, again: str) -> None:
    """Raises UserError for a value of the right type that cannot be."""
    bounds = {"batch": (manifest.batch, MAX_IMAGES)}
    if not 1 <= manifest.prompt_slots <= MAX_PROMPT_TOKENS:
        expected = f"1 to {MAX_PROMPT_TOKENS}"
        raise wrong_value(source, "prompt_slots", expected, manifest.prompt_slots, again)
    for graph, entry in manifest.graphs.items():
        if not entry.profiles:
            raise wrong_value(source, f"graphs.{graph}.profiles", "one or more", [], again)
        for index, profile in enumerate(entry.profiles):
            place = f"graphs.{graph}.profiles[{index}]"
            bounds[f"{place}.images"] = (profile.images, MAX_IMAGES)
            bounds[f"{place}.prompt_tokens"] = (profile.prompt_tokens, MAX_PROMPT_TOKENS)
            if graph.startswith(DECODE_WINDOW) and not 2 <= profile.window <= MAX_LOOKAHEAD:
                expected = f"2 to {MAX_LOOKAHEAD}"
                raise wrong_value(source, f"{place}.window", expected, profile.window, again)
        for name, weight in entry.weights.items():
            if weight.dtype not in DTYPES or min(weight.offset, weight.num_bytes) < 0:
                place, expected = f"graphs.{graph}.weights.{name}", "a dtype, an offset and a size"
                raise wrong_value(source, place, expected, str(weight), again)
    for place, ((least, usual, largest), most) in bounds.items():
        if not 1 <= least <= usual <= largest <= most:
            expected = f"three rising numbers from 1 to {most}"
            raise wrong_value(source, place, expected, [least, usual, largest], again)


def check_provenance(engine_json: EngineManifest, here: Here) -> None:
    """Returns if engines of this engine.json can be loaded here.

    Raises: UserError, one line with the command that builds a fitting one, for another
    flavor, version, GPU, system or bundle.
    """
    again = rebuild(here.bundle_path)
    built = f"{engine_json.flavor} {engine_json.version}"
    if built != f"{here.flavor} {here.version}":
        raise UserError(
            f"the engine was built with {built} and {here.flavor} {here.version} is here; {again}"
        )
    if here.compute_capability not in engine_json.compute_capabilities:
        wanted = ", ".join(
            f"{capability / 10:.1f}" for capability in engine_json.compute_capabilities
        )
        raise UserError(
            f"the engine is for GPUs of compute capability {wanted} and this one has "
            f"{here.compute_capability / 10:.1f}; {again}"
        )
    if (engine_json.os, engine_json.arch) != (here.os, here.arch):
        raise UserError(
            f"the engine is for {engine_json.os} {engine_json.arch} and this is {here.os}"
            f" {here.arch}; {again}"
        )
    if engine_json.bundle_hash != here.bundle_hash:
        raise UserError(
            f"the engine was built from another bundle than {here.bundle_path}; {again}"
        )


def check_batch(engine_json: EngineManifest, num_images: int, bundle_path: str) -> None:
    """Raises UserError, with the command that builds a fitting one, for a batch outside the
    engine's profile.
    """
    least, usual, most = engine_json.batch
    if not least <= num_images <= most:
        wider = f"{min(least, num_images)}:{usual}:{max(most, num_images)}"
        raise UserError(
            f"the engine generates {least} to {most} images at once, not {num_images}; "
            f"{rebuild(bundle_path)} --batch {wider}"
        )


def rebuild(bundle_path: str) -> str:
    """The advice that ends every refusal."""
    return f"build it here: ssd-export build-engine --bundle {bundle_path}"
