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

import onnx_ir as ir
import tensorrt_rtx as trt

from ssd_export.export.functions import DOMAIN, OP_TYPE, AttentionNode
from ssd_export.export.plugin_flavor import PLUGIN_VERSION
from ssd_export.kernels.image import KernelImage, Variant, attach_kernel
from ssd_export.model.families.janus import GRID
from ssd_export.policy.table import Rule

PTX = (
    b".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry decode_attention_kernel() {"
    b" ret; }\n"
)
IMAGE = KernelImage(
    75, Variant("float16", 64), "decode_attention_kernel", 4, 512, 64, 1024, 80, "", "", "", ""
)
ROWS = (2, 4, 8)


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.lines.append(message)


def model(groups: list[tuple[Rule, int, int]], changed: dict, shapes: dict) -> ir.Model:
    """A graph of one node for each (rule, num_slots, evict_every): 2 KV heads, 4 query heads,
    head_dim 64, float16.
    """
    inputs, outputs, nodes = [], [], []
    float16, float32, int32 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT32
    for number, (rule, num_slots, evict_every) in enumerate(groups):
        attributes = (
            AttentionNode(
                rule, num_slots, 2, evict_every, 1.0, 2, 64, "float16", True, GRID.width
            ).attributes()
            | changed
        )
        slots = ("rows", 2, num_slots)
        caches = {
            "key": (float16, (*slots, 64)),
            "value": (float16, (*slots, 64)),
            "position": (int32, slots),
        }
        caches |= {"score": (float32, slots)} if rule.by_score else {}
        token = {
            "query": (float16, ("rows", 4, 64)),
            "key": (float16, ("rows", 2, 64)),
            "value": (float16, ("rows", 2, 64)),
            "position": (int32, ("rows",)),
            "prompt_length": (int32, ("rows",)),
        }
        token |= {name: (token[name][0], shape) for name, shape in shapes.items()}
        given = [value(f"{name}.{number}", *spec) for name, spec in token.items()]
        given += [value(f"past_{name}.{number}", *spec) for name, spec in caches.items()]
        made = [value(f"out.{number}", *token["query"])]
        made += [value(f"present_{name}.{number}", *spec) for name, spec in caches.items()]
        onnx = [
            ir.AttrFloat32(k, v) if isinstance(v, float) else ir.AttrInt64(k, v)
            for k, v in attributes.items()
        ]
        onnx.append(ir.AttrString("plugin_version", PLUGIN_VERSION))
        nodes.append(ir.Node(DOMAIN, OP_TYPE, given, onnx, outputs=made, name=f"attend.{number}"))
        inputs, outputs = inputs + given, outputs + made
    return ir.Model(
        ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 18, DOMAIN: 1}, name="step"),
        ir_version=10,
    )


def value(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def build(
    library: str,
    log: Log,
    groups: list,
    kernel: dict,
    changed: dict | None = None,
    shapes: dict | None = None,
) -> dict:
    log.lines.clear()
    onnx = model(groups, changed or {}, shapes or {})
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
    kernel, scored, window = (
        IMAGE.attributes(PTX),
        (Rule(-1, 6, True), 180, 6),
        (Rule(4, 0, False), 64, 1),
    )
    runs: dict[str, dict] = {
        "both": {"groups": [window, scored], "kernel": kernel},
        "no kernel": {"groups": [scored], "kernel": {}},
        "not an image": {
            "groups": [scored],
            "kernel": kernel | {"kernel_image": b"something else"},
        },
        "unknown dtype": {"groups": [scored], "kernel": kernel | {"kernel_dtype": "int8"}},
        "too much shared memory": {
            "groups": [scored],
            "kernel": kernel | {"kernel_shared_bytes": 50000},
        },
        "evict_every": {"groups": [scored], "kernel": kernel, "changed": {"evict_every": 0}},
        "evicts more than all": {
            "groups": [scored],
            "kernel": kernel,
            "changed": {"evict_every": 181},
        },
        "score_decay": {"groups": [scored], "kernel": kernel, "changed": {"score_decay": 1.5}},
        "pinned_columns": {
            "groups": [scored],
            "kernel": kernel,
            "changed": {"pinned_columns": 1 << GRID.width},
        },
        "score missing": {"groups": [window], "kernel": kernel, "changed": {"by_score": 1}},
        "too many slots": {"groups": [(window[0], 1025, 1)], "kernel": kernel},
        "head_dim": {"groups": [window], "kernel": kernel | {"kernel_head_dim": 128}},
        "query heads": {"groups": [window], "kernel": kernel, "shapes": {"query": ("rows", 3, 64)}},
        "key shape": {"groups": [window], "kernel": kernel, "shapes": {"key": ("rows", 1, 64)}},
    }
    for name, run in runs.items():
        print(
            f"== {name}", file=sys.stderr, flush=True
        )  # the plugin's messages, which go there, stand below it
        print(
            json.dumps({"name": name, **build(str(Path(library).resolve()), log, **run)}),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1])
