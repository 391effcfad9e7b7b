"""Builds TensorRT-RTX engines of DecodeAttention nodes with the C++ plugin and prints what came out
as JSON.

A separate process: python -m tests.plugins.rtx_build LIBRARY, with a folder on LD_LIBRARY_PATH
that holds a link named libtensorrt_rtx.so. The library's parser opens that name, the wheel lacks
it, and the process would abort.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tensorrt_rtx as trt

from ssd_export.export.functions import DOMAIN, OP_TYPE, AttentionNode
from ssd_export.export.plugin_flavor import OF_GROUPS, OF_LAYER, PLUGIN_VERSION
from ssd_export.kernels.image import KERNELS, KernelCode, KernelImage, Variant, attach_kernel
from ssd_export.model.families.janus import GRID
from ssd_export.policy.table import Rule

PTX = b".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry k() { ret; }\n"
CODES = dict.fromkeys(KERNELS, KernelCode("k", 512, "", "", "", ""))
IMAGE = KernelImage(75, Variant("float16", 64), 4, 16, 1024, 32, 80, CODES)
ROWS = (2, 4, 8)


Group = tuple[Rule, int, int]  # rule, num_slots, evict_every


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.lines.append(message)


def model(layers: list[list[Group]], changed: dict, shapes: dict) -> ir.Model:
    """A graph of one node for each layer, a list of (rule, num_slots, evict_every): 2 KV heads a
    group, two query heads each, head_dim 64, float16.
    """
    inputs, outputs, nodes = [], [], []
    for number, groups in enumerate(layers):
        heads = 2 * len(groups)
        caches = {
            f"{name}.{number}.{place}": spec
            for place, group in enumerate(groups)
            for name, spec in caches_of(group).items()
        }
        token = {
            "heads": (ir.DataType.FLOAT16, ("rows", 4 * heads, 64)),
            "position": (ir.DataType.INT32, ("rows",)),
            "prompt_length": (ir.DataType.INT32, ("rows",)),
        }
        token |= {name: (token[name][0], shape) for name, shape in shapes.items()}
        out = ir.DataType.FLOAT16, ("rows", 2 * heads, 64)
        given = [value(f"{name}.{number}", *spec) for name, spec in token.items()]
        given += [value(f"past_{name}", *spec) for name, spec in caches.items()]
        made = [value(f"out.{number}", *out)]
        made += [value(f"present_{name}", *spec) for name, spec in caches.items()]
        attributes = onnx_attributes(attributes_of(groups) | changed)
        nodes.append(
            ir.Node(DOMAIN, OP_TYPE, given, attributes, outputs=made, name=f"attend.{number}")
        )
        inputs, outputs = inputs + given, outputs + made
    return ir.Model(
        ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 18, DOMAIN: 1}, name="step"),
        ir_version=10,
    )


def caches_of(group: Group) -> dict[str, tuple[ir.DataType, tuple[int | str, ...]]]:
    """Type and shape of each part of a group's cache."""
    rule, num_slots, _ = group
    slots = ("rows", 2, num_slots)
    caches: dict[str, tuple[ir.DataType, tuple[int | str, ...]]] = {
        "key": (ir.DataType.FLOAT16, (*slots, 64)),
        "value": (ir.DataType.FLOAT16, (*slots, 64)),
        "position": (ir.DataType.INT32, slots),
    }
    return caches | ({"score": (ir.DataType.FLOAT, slots)} if rule.by_score else {})


def attributes_of(groups: list[Group]) -> dict[str, Any]:
    """As export/plugin_flavor.py joins those of the groups' nodes."""
    nodes = [
        AttentionNode(
            rule, num_slots, 2, evict_every, 1.0, 2, 64, "float16", True, GRID.width
        ).attributes()
        for rule, num_slots, evict_every in groups
    ]
    lists = {name: [int(node.get(name, 0)) for node in nodes] for name in OF_GROUPS}
    return lists | {name: nodes[0][name] for name in OF_LAYER}


def onnx_attributes(values: dict[str, Any]) -> list[ir.Attr]:
    """Attributes of a node."""
    kinds = {list: ir.AttrInt64s, int: ir.AttrInt64, float: ir.AttrFloat32}
    attributes = [kinds[type(value)](name, value) for name, value in values.items()]
    return [*attributes, ir.AttrString("plugin_version", PLUGIN_VERSION)]


def value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def build(
    library: str,
    log: Log,
    layers: list[list[Group]],
    kernel: dict,
    changed: dict | None = None,
    shapes: dict | None = None,
) -> dict:
    log.lines.clear()
    onnx = model(layers, changed or {}, shapes or {})
    if kernel:
        attach_kernel(onnx, kernel, DOMAIN, OP_TYPE)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(ir.to_proto(onnx).SerializeToString()):
        return {"engine_bytes": 0}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.plugins_to_serialize = [library]
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(
            tensor.name,
            *[tuple(rows if size < 0 else size for size in tensor.shape) for rows in ROWS],
        )
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    layers = "\n".join(line for line in log.lines if line.startswith("Layers:"))
    return {
        "engine_bytes": 0 if engine is None else engine.nbytes,
        "network": [str(network.get_layer(index).type) for index in range(network.num_layers)],
        "layers": re.findall(r"LayerType: (\w+)", layers),
        "holds_library": any("plugin library" in line and "to plan" in line for line in log.lines),
    }


def main(library: str) -> None:
    log = Log()
    registry = trt.get_plugin_registry()
    registry.load_library(library)
    found = [
        (c.name, c.plugin_namespace, c.plugin_version)
        for c in registry.all_creators
        if c.name == OP_TYPE
    ]
    print(json.dumps({"name": "registry", "creators": found}))
    kernel = IMAGE.attributes(dict.fromkeys(KERNELS, PTX))
    scored, window = (Rule(-1, 6, True), 180, 6), (Rule(4, 0, False), 64, 1)
    pinned = (Rule(-1, 6, True, 1 | 1 << 22), 300, 24)
    of_scored: dict[str, dict] = {
        "no kernel": {"kernel": {}},
        "not an image": {"kernel": kernel | {"kernel_part_image": b"something else"}},
        "unknown dtype": {"kernel": kernel | {"kernel_dtype": "int8"}},
        "too much shared memory": {"kernel": kernel | {"kernel_sum_shared_bytes": 50000}},
        "evict_every": {"changed": {"evict_every": [0]}},
        "evicts more than all": {"changed": {"evict_every": [181]}},
        "score_decay": {"changed": {"score_decay": 1.5}},
        "pinned_columns": {"changed": {"pinned_columns": [1 << GRID.width]}},
        "groups differ": {"changed": {"num_recent": [6, 6]}},
        "four groups": {"changed": {"num_sinks": [-1] * 4}},
    }
    runs: dict[str, dict] = {
        "both": {"layers": [[window, scored], [pinned, scored, window], [window]]},
        **{name: {"layers": [[scored]], **run} for name, run in of_scored.items()},
        "score missing": {"layers": [[window]], "changed": {"by_score": [1]}},
        "too many slots": {"layers": [[(window[0], 1025, 1)]]},
        "head_dim": {"layers": [[window]], "kernel": kernel | {"kernel_head_dim": 128}},
        "query heads": {"layers": [[window]], "shapes": {"heads": ("rows", 7, 64)}},
        "heads shape": {"layers": [[window]], "shapes": {"heads": ("rows", 8, 32)}},
    }
    for name, run in runs.items():
        print(
            f"== {name}", file=sys.stderr, flush=True
        )  # the plugin's messages, which go there, stand below it
        print(
            json.dumps(
                {
                    "name": name,
                    **build(str(Path(library).resolve()), log, **{"kernel": kernel, **run}),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1])
