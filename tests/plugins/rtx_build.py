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

from ssd_export.export import plugin_flavor
from ssd_export.export.functions import DOMAIN, AttentionNode
from ssd_export.export.plugin_flavor import OF_GROUPS, OF_LAYER, NodeKind
from ssd_export.kernels.image import (
    KERNELS,
    NODE_KERNELS,
    KernelCode,
    KernelImage,
    Variant,
    attach_kernel,
)
from ssd_export.model.families.janus import GRID
from ssd_export.policy.table import Rule

PTX = b".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry k() { ret; }\n"
CODES = dict.fromkeys(KERNELS, KernelCode("k", 512, "", "", "", ""))
IMAGE = KernelImage(75, Variant("float16", 64), 4, 16, 1024, 32, 80, CODES)
DATA = dict.fromkeys(KERNELS, PTX)
ROWS = (2, 4, 8)
WINDOW = 5


Group = tuple[Rule, int, int]  # rule, num_slots, evict_every


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.lines.append(message)


def model(layers: list[list[Group]], changed: dict, shapes: dict, window: bool) -> ir.Model:
    """A graph of one node for each layer, a list of (rule, num_slots, evict_every), or of two for a
    window: 2 KV heads a group, two query heads each, head_dim 64, float16.
    """
    made = [
        layer_of(number, groups, changed, shapes, window) for number, groups in enumerate(layers)
    ]
    inputs, outputs, nodes = ([one for layer in made for one in layer[part]] for part in range(3))
    return ir.Model(
        ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 18, DOMAIN: 1}, name="step"),
        ir_version=10,
    )


def layer_of(
    number: int, groups: list[Group], changed: dict, shapes: dict, window: bool
) -> tuple[list[ir.Value], list[ir.Value], list[ir.Node]]:
    """Inputs, outputs and nodes of a layer."""
    heads, places = 2 * len(groups), (WINDOW,) if window else ()
    caches = {
        f"{name}.{number}.{place}": spec
        for place, group in enumerate(groups)
        for name, spec in caches_of(group).items()
    }
    of_rows, of_queries = (ir.DataType.INT32, ("rows",)), ("rows", 2 * heads, *places)
    kept = max((slots for rule, slots, _ in groups if rule.by_score), default=0) + WINDOW
    specs: dict[str, tuple[ir.DataType, tuple[int | str, ...]]] = {
        "heads": (ir.DataType.FLOAT16, ("rows", 4 * heads, *places, 64)),
        **dict.fromkeys(("position", "prompt_length", "active", "counts"), of_rows),
        "out": (ir.DataType.FLOAT16, (*of_queries, 64)),
        "logits": (ir.DataType.FLOAT, (*of_queries, kept)),
        **dict.fromkeys(("largest", "total"), (ir.DataType.FLOAT, of_queries)),
    }
    specs |= {name: (specs[name][0], shape) for name, shape in shapes.items()}
    there = {f"past_{name}": value(f"past_{name}", *spec) for name, spec in caches.items()}
    attributes = attributes_of(groups) | changed
    nodes, given = [], dict(there)
    for kind in (plugin_flavor.WINDOW, plugin_flavor.SETTLE) if window else (plugin_flavor.STEP,):
        for name in kind.inputs:
            given.setdefault(name, value(f"{name}.{number}", *specs[name]))
        last = kind is not plugin_flavor.WINDOW
        made = [value(f"{name}.{number}", *specs[name]) for name in kind.outputs]
        made += [
            value(f"{'present' if last else 'between'}_{name}", *spec)
            for name, spec in caches.items()
        ]
        own = [given[name] for name in kind.inputs] + [given[name] for name in there]
        nodes.append(
            ir.Node(
                DOMAIN,
                kind.op_type,
                own,
                onnx_attributes(attributes, kind),
                outputs=made,
                name=f"{kind.op_type}.{number}",
            )
        )
        given |= dict(zip([*kind.outputs, *there], made, strict=True))
    inputs = dict.fromkeys(one for node in nodes for one in node.inputs)
    inputs = [one for one in inputs if one.producer() is None]
    return inputs, [nodes[0].outputs[0], *nodes[-1].outputs[-len(caches) :]], nodes


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


def onnx_attributes(values: dict[str, Any], kind: NodeKind) -> list[ir.Attr]:
    """Attributes of a node."""
    kinds = {list: ir.AttrInt64s, int: ir.AttrInt64, float: ir.AttrFloat32}
    attributes = [kinds[type(value)](name, value) for name, value in values.items()]
    return [*attributes, ir.AttrString("plugin_version", kind.version)]


def value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def build(
    library: str,
    log: Log,
    layers: list[list[Group]],
    kernel: dict | None = None,
    changed: dict | None = None,
    shapes: dict | None = None,
    window: bool = False,
) -> dict:
    """kernel: attributes beside those of the kernels; None: no kernels."""
    log.lines.clear()
    onnx = model(layers, changed or {}, shapes or {}, window)
    if kernel is not None:
        for op_type in NODE_KERNELS:
            attach_kernel(onnx, IMAGE.attributes(DATA, op_type) | kernel, DOMAIN, op_type)
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
        if c.plugin_namespace == DOMAIN
    ]
    print(json.dumps({"name": "registry", "creators": found}))
    scored, window = (Rule(-1, 6, True), 180, 6), (Rule(4, 0, False), 64, 1)
    pinned = (Rule(-1, 6, True, 1 | 1 << 22), 300, 24)
    of_scored: dict[str, dict] = {
        "no kernel": {"kernel": None},
        "not an image": {"kernel": {"kernel_part_image": b"something else"}},
        "unknown dtype": {"kernel": {"kernel_dtype": "int8"}},
        "too much shared memory": {"kernel": {"kernel_sum_shared_bytes": 50000}},
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
        "head_dim": {"layers": [[window]], "kernel": {"kernel_head_dim": 128}},
        "query heads": {"layers": [[window]], "shapes": {"heads": ("rows", 7, 64)}},
        "heads shape": {"layers": [[window]], "shapes": {"heads": ("rows", 8, 32)}},
        "windows": {
            "layers": [[window, scored], [pinned, scored, window], [window]],
            "window": True,
        },
        "no places": {"layers": [[scored]], "shapes": {"heads": ("rows", 8, 64)}, "window": True},
    }
    for name, run in runs.items():
        print(
            f"== {name}", file=sys.stderr, flush=True
        )  # the plugin's messages, which go there, stand below it
        print(
            json.dumps(
                {
                    "name": name,
                    **build(str(Path(library).resolve()), log, **{"kernel": {}, **run}),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1])
