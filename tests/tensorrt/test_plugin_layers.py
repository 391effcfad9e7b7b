"""Both flavors of one bundle, layer by layer: the plugin flavor has one plugin layer for each
layer of the model, whose head groups share it, the plain none.

Needs TensorRT-RTX and nothing else: the plugin is a Python class here
(tests/plugins/python_plugin.py); with the C++ library the same is tested in test_engines.py. Layers
are counted in the parsed network and in the listing that the builder prints of the finished engine:
IEngineInspector wants an engine that is loaded, and loading wants a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.tensorrt.engine_manifest import EngineManifest, read_engines
from ssd_export.tensorrt.plan import PREFILLS
from ssd_export.tensorrt.plugin import num_attention_nodes
from ssd_export.typed_json import parse_json
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file
from tests.tensorrt.kernels import write_kernels

ROOT = Path(__file__).parents[2]
TINY = TinyJanus(seed=3, num_kv_heads=2)
DECODE_STEPS = ("decode_step", "decode_step_top_k")
WINDOWS = ("decode_window", "decode_window_top_k")

NEEDS_RTX = "needs TensorRT-RTX: pip install ssd-export[rtx]"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason=NEEDS_RTX),
]


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[EngineManifest, EngineManifest, Bundle]:
    """engine.json of the plain and of the plugin flavor, and the bundle after both were built, in
    this order.
    """
    model, folder = checkpoint(TINY), tmp_path_factory.mktemp("flavors")
    whole = bundle(model, "ssd-row", head_map=str(head_map_file(model)), dtype="fp16")
    copy = shutil.copytree(whole, folder / "bundle")
    (folder / "kernels").mkdir()
    kernels = write_kernels(folder / "kernels", targets=(75, 80), head_dim=TINY.head_dim)
    command = [sys.executable, "-m", "tests.tensorrt.both_flavors", str(copy)]
    environment = os.environ | {"SSD_EXPORT_KERNELS": str(kernels)}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    plain, plugin = (
        parse_json(line.encode(), EngineManifest, "printed", "") for line in run.stdout.splitlines()
    )
    return plain, plugin, open_bundle(copy)


def test_the_plugin_flavor_has_one_plugin_layer_for_each_attention(built: tuple) -> None:
    _, plugin, made = built
    wanted, layers = num_attention_nodes(made), made.config.policy.layers
    assert wanted == plugin.plugin.num_nodes == len(layers) and max(map(len, layers)) > 1
    nodes = dict.fromkeys(DECODE_STEPS, wanted) | dict.fromkeys(WINDOWS, 2 * wanted)
    for name, graph in plugin.graphs.items():
        assert graph.layers.get("PluginV3", 0) == nodes.get(name, 0)
        caches = {
            tensor.name
            for tensor in made.config.graphs[name].cache_outputs.values()
            if name in nodes or tensor.name.endswith((".key", ".value"))
        }
        in_place = caches if name in nodes or name in PREFILLS else set()
        assert set(graph.aliases) == in_place, "prefill writes keys and values, the plugin all"
    assert nodes.keys() <= plugin.graphs.keys()
    assert plugin.flags.aliased_plugin_io
    assert not any("not checked" in warning for warning in plugin.warnings)
    assert "evict" not in plugin.graphs, "the kernel evicts by itself"


def test_the_plain_flavor_has_none(built: tuple) -> None:
    plain, plugin, _ = built
    assert plain.bundle_hash == plugin.bundle_hash, "both from the same bundle"
    assert plain.plugin is None and not plain.flags.aliased_plugin_io
    assert set(plain.graphs) == {
        "prefill",
        "decode_step",
        "evict",
        "image_decoder",
        "prefill_top_k",
        DECODE_STEPS[1],
        *WINDOWS,
    }
    for graph in plain.graphs.values():
        assert sum(graph.layers.values()) > 0 and "PluginV3" not in graph.layers
    for name in (*DECODE_STEPS, *WINDOWS):
        assert sum(plain.graphs[name].layers.values()) > sum(plugin.graphs[name].layers.values())


def test_a_later_build_leaves_nothing_of_an_earlier_one(built: tuple) -> None:
    _, plugin, made = built
    ((folder, values),) = read_engines(made).items()
    assert values == plugin
    there = {path.name for path in (made.path / folder).iterdir()}
    assert there == {graph.engine for graph in plugin.graphs.values()} | {"engine.json"}
