"""The plugin's part of a build: where its library and kernels come from, and the graphs that use
it.

The library is `libssd_export_plugin.so` (plugins/README.md): $SSD_EXPORT_PLUGIN, else build/plugins
in the source tree that this package runs from. Never one in the folder where somebody happens to
stand: a library is code. The kernel is taken from the folder $SSD_EXPORT_KERNELS, else the tree's
build/kernels, else compiled now where Triton is installed. A board has no Triton: `build-engine
--target jetson-orin` on a workstation leaves the finished graphs, kernels inside, in the bundle as
engines/plugin-sm87/decode_step.onnx and, for lookahead, decode_window.onnx, and the board takes
them from there.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.kernels.image import (
    FIRST_EXACT_TARGET,
    NODE_KERNELS,
    KernelImage,
    Variant,
    attach_kernel,
    find_image,
    read_image,
    read_manifest,
)
from ssd_export.tensorrt.flavors import Flavor
from ssd_export.tensorrt.step_form import DECODE_WINDOW
from ssd_export.tensorrt.target import AUTO, choose_target

LIBRARY = "libssd_export_plugin.so"
LIBRARY_VARIABLE, KERNELS_VARIABLE = "SSD_EXPORT_PLUGIN", "SSD_EXPORT_KERNELS"
PLUGIN_NAMES = tuple(NODE_KERNELS)
# Of the nodes in export/plugin_flavor.py, which a board cannot import.
STEP_VERSION, WINDOW_VERSION = "4", "1"
VERSION_IN_FILE = re.compile(rb'plugin_version".(\d+)', re.DOTALL)  # as protobuf writes it
SOURCE_TREE = Path(__file__).parents[2]
HOW_TO_BUILD = (
    f"cmake -S plugins -B build/plugins && cmake --build build/plugins, or set {LIBRARY_VARIABLE}"
    f" to {LIBRARY}, or use --plugin off"
)


def find_library() -> Path:
    """The plugin library, absolute. Raises: UserError where there is none."""
    asked = os.environ.get(LIBRARY_VARIABLE)
    place = Path(asked) if asked else SOURCE_TREE / "build" / "plugins" / LIBRARY
    if place.is_file():
        return place.resolve()
    raise UserError(f"no plugin library at {place}; build it: {HOW_TO_BUILD}")


def load_library(flavor: Flavor, library: Path, names: Sequence[str] = PLUGIN_NAMES) -> None:
    """Registers the plugin with TensorRT, once a process.

    Args: names: the nodes that are needed; libraries of earlier versions have the first alone.
    Raises: UserError where the library does not load, or has not all of them.
    """
    registry = flavor.trt.get_plugin_registry()

    def is_registered() -> bool:
        return {*names} <= {creator.name for creator in registry.all_creators}

    if not is_registered():
        registry.load_library(str(library))
    if not is_registered():
        raise UserError(
            f"{library} does not load into {flavor.name} {flavor.version} with {', '.join(names)};"
            f" build it again: {HOW_TO_BUILD}"
        )


def prepared_name(graph: str, capability: int) -> str:
    """The file in which a bundle keeps a decode step that was prepared for a board."""
    return f"engines/plugin-sm{capability}/{graph}.onnx"


def num_attention_nodes(bundle: Bundle) -> int:
    """One for each layer."""
    return len(bundle.config.policy.layers)


def num_plugin_nodes(bundle: Bundle, graph: str) -> int:
    """Nodes of the plugin in a graph: two a layer in a pass of lookahead, one in a decode step."""
    return num_attention_nodes(bundle) * (2 if graph.startswith(DECODE_WINDOW) else 1)


def plugin_graph(bundle: Bundle, graph: str, capabilities: tuple[int, ...]) -> bytes:
    """The graph that was prepared for this GPU, else one made now. Raises: UserError as
    make_plugin_graph.
    """
    if len(capabilities) == 1 and prepared_name(graph, capabilities[0]) in bundle.files:
        return bundle.file(prepared_name(graph, capabilities[0])).read_bytes()
    return make_plugin_graph(bundle, graph, capabilities)


def check_prepared(bundle: Bundle, graph: str, capabilities: tuple[int, ...]) -> None:
    """Raises UserError where a graph was prepared for another version of the plugin, of which
    TensorRT would say no more than that it has no such plugin.
    """
    if len(capabilities) != 1 or prepared_name(graph, capabilities[0]) not in bundle.files:
        return
    prepared = bundle.file(prepared_name(graph, capabilities[0]))
    versions = {found.decode() for found in VERSION_IN_FILE.findall(prepared.read_bytes())}
    version = WINDOW_VERSION if graph.startswith(DECODE_WINDOW) else STEP_VERSION
    if versions != {version}:
        target = choose_target(AUTO, capabilities[0]).name
        raise UserError(
            f"{prepared} was prepared for version {', '.join(sorted(versions)) or 'none'} of the"
            f" plugin's node, and this ssd-export has version {version}; where the bundle comes"
            f" from, run ssd-export build-engine --bundle DIR --target {target} again and copy it"
            " here, or use --plugin off"
        )


def make_plugin_graph(bundle: Bundle, graph: str, capabilities: tuple[int, ...]) -> bytes:
    """A decode step or a pass of lookahead of the bundle as a ModelProto: plugin nodes for each
    layer, the kernels for these GPUs inside.

    Args: graph: decode_step, decode_window, or one of these with _top_k.

    Raises: UserError where there is no kernel for them, or the kernel does not read such caches.
    """
    if bundle.config.policy.kv_dtype != "model":
        raise UserError(
            "the plugin's kernel reads caches in the model's dtype and this bundle's are int8;"
            " build with --plugin off, or export with --kv-dtype model"
        )
    variant = Variant(bundle.config.dtype, bundle.config.model.head_dim)
    image, data = kernel_for(capabilities, variant)
    import onnx_ir as ir

    from ssd_export.export.functions import DOMAIN
    from ssd_export.export.plugin_flavor import plugin_flavor
    from ssd_export.export.plugin_window import window_flavor

    model = ir.load(bundle.file(f"onnx/{graph}.onnx"))
    is_window = graph.startswith(DECODE_WINDOW)
    model = window_flavor(model, bundle.config) if is_window else plugin_flavor(model)
    kinds = [attach_kernel(model, image.attributes(data, n), DOMAIN, n) for n in PLUGIN_NAMES]
    if sum(kinds) != num_plugin_nodes(bundle, graph):
        raise ValueError(f"{graph}.onnx has {sum(kinds)} nodes of the plugin")
    return ir.to_proto(model).SerializeToString()


def kernel_for(
    capabilities: tuple[int, ...], variant: Variant
) -> tuple[KernelImage, dict[str, bytes]]:
    """Kernels that run on every one of these GPUs: the cubins for one, PTX for several.

    Raises: UserError where there is none and Triton is not installed.
    """
    asked = os.environ.get(KERNELS_VARIABLE)
    folder = Path(asked) if asked else SOURCE_TREE / "build" / "kernels"
    if asked or folder.is_dir():
        return _from_folder(folder, capabilities, variant)
    if find_spec("triton") is None:
        raise UserError(
            f"no kernel images in {folder} and no Triton to compile them: pip install"
            f" ssd-export[kernels], or set {KERNELS_VARIABLE} to a folder of python -m"
            " ssd_export.kernels.compile, or use --plugin off"
        )
    from ssd_export.kernels.compile import compile_kernels

    oldest = min(capabilities) if len(capabilities) == 1 else _portable(capabilities)
    with tempfile.TemporaryDirectory() as scratch:
        compile_kernels(Path(scratch), (oldest,), (variant.dtype,), (variant.head_dim,))
        return _from_folder(Path(scratch), capabilities, variant)


def _from_folder(
    folder: Path, capabilities: tuple[int, ...], variant: Variant
) -> tuple[KernelImage, dict[str, bytes]]:
    images = read_manifest(folder)
    if len(capabilities) == 1:
        image, kind = find_image(images, capabilities[0], variant)
        return image, read_image(folder, image, kind)
    fitting = [image for image in images if image.target <= _portable(capabilities)]
    newest = max(
        (image.target for image in fitting if image.variant == variant),
        default=_portable(capabilities),
    )
    image, _ = find_image(fitting, newest, variant)
    return image, read_image(folder, image, "ptx")


def _portable(capabilities: tuple[int, ...]) -> int:
    """The newest target whose PTX runs on all of them: from 9.0 on, PTX is for one architecture
    alone.
    """
    return min(*capabilities, FIRST_EXACT_TARGET - 1)
