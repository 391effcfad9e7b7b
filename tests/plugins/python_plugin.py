"""The plugin as a Python class: name, namespace, version, fields, outputs and aliases of the C++
one, for building alone.

It stands in for the library where TensorRT's headers are absent, so that how graphs map to the
plugin is tested everywhere. It has no kernel: an engine with it is inspected, never run.
"""

from __future__ import annotations

from typing import Any

from ssd_export.export.functions import DOMAIN
from ssd_export.export.plugin_flavor import KINDS, NodeKind
from ssd_export.kernels.image import NODE_KERNELS

PARTS = 3  # of the cache of a head group, beside the score
LISTS = ("num_sinks", "num_recent", "by_score", "pinned_columns", "age_quota", "evict_every")
INTEGERS = (
    "grid_width",
    "kernel_head_dim",
    "kernel_max_slots",
    "kernel_block_slots",
    "kernel_max_splits",
    "kernel_num_warps",
)
REALS = ("score_decay",)
TEXTS = ("kernel_dtype",)


def register(trt: Any) -> Any:
    """Registers the creators with TensorRT; hold on to what is returned while anything is built."""
    creators = [plugin_creator(trt, kind) for kind in KINDS]
    registry = trt.get_plugin_registry()
    assert all(registry.register_creator(creator, DOMAIN) for creator in creators)
    return creators


def plugin_creator(trt: Any, kind: NodeKind) -> Any:
    """The IPluginCreatorV3One of a kind of node, of one module: tensorrt or tensorrt_rtx."""
    first_cache, num_own = len(kind.inputs), len(kind.outputs)

    class Plugin(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime
    ):
        def __init__(self, fields: dict[str, Any]) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.fields = fields
            self.plugin_name, self.plugin_namespace = kind.op_type, DOMAIN
            self.plugin_version = kind.version
            parts = [PARTS + by_score for by_score in fields["by_score"]]
            self.num_outputs = num_own + sum(parts)
            firsts = (sum(parts[:place]) for place in range(len(parts)))
            self.keys = [first_cache + first for first in firsts]

        def get_capability_interface(self, kind: Any) -> Plugin:
            return self

        def get_aliased_input(self, output: int) -> int:
            return -1 if output < num_own else first_cache + output - num_own

        def get_output_data_types(self, inputs: list[Any]) -> list[Any]:
            own = [inputs[0] if name == "out" else trt.float32 for name in kind.outputs]
            return [*own, *inputs[first_cache:]]

        def get_output_shapes(
            self, inputs: list[Any], shape_inputs: list[Any], expressions: Any
        ) -> list[Any]:
            out, kinds = trt.DimsExprs(inputs[0]), trt.DimensionOperation
            kept = expressions.constant(0)
            for key, by_score in zip(self.keys, self.fields["by_score"], strict=True):
                both = expressions.operation(kinds.PROD, expressions.constant(2), inputs[key][1])
                out[1] = expressions.operation(kinds.SUB, out[1], both)
                if by_score:
                    kept = expressions.operation(kinds.MAX, kept, inputs[key][2])
            shapes = {"out": out}
            if num_own > 1:
                kept = expressions.operation(kinds.SUM, kept, out[2])
                of_queries = list(out)[:3]
                shapes |= {name: trt.DimsExprs(of_queries) for name in ("largest", "total")}
                shapes["logits"] = trt.DimsExprs([*of_queries, kept])
            caches = (trt.DimsExprs(one) for one in inputs[first_cache:])
            return [*(shapes[name] for name in kind.outputs), *caches]

        def supports_format_combination(
            self, place: int, tensors: list[Any], num_inputs: int
        ) -> bool:
            return tensors[place].desc.format == trt.TensorFormat.LINEAR

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_workspace_size(self, inputs: list[Any], outputs: list[Any]) -> int:
            return 0

        def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
            pass

        def attach_to_context(self, context: Any) -> Plugin:
            return self.clone()

        def clone(self) -> Plugin:
            return Plugin(self.fields)

        def enqueue(self, *arguments: Any) -> None:
            raise NotImplementedError("a stand-in that is built and inspected, never run")

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace = kind.op_type, DOMAIN
            self.plugin_version = kind.version
            declared = declared_fields(trt, kind).items()
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, b"", own) for name, own in declared]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Plugin:
            given = {field.name: field for field in fields}
            missing = declared_fields(trt, kind).keys() - given.keys()
            if missing:
                raise ValueError(f"{name} lacks the fields {sorted(missing)}")
            return Plugin({"by_score": [int(one) for one in given["by_score"].data]})

    return Creator()


def declared_fields(trt: Any, kind: NodeKind) -> dict[str, Any]:
    """Field name -> its type."""
    kinds = trt.PluginFieldType
    return {
        **dict.fromkeys((*LISTS, *INTEGERS), kinds.INT32),
        **dict.fromkeys(REALS, kinds.FLOAT32),
        **dict.fromkeys(TEXTS, kinds.CHAR),
        **{f"kernel_{kernel}_image": kinds.INT8 for kernel in NODE_KERNELS[kind.op_type]},
        **{f"kernel_{kernel}_name": kinds.CHAR for kernel in NODE_KERNELS[kind.op_type]},
        **{f"kernel_{kernel}_shared_bytes": kinds.INT32 for kernel in NODE_KERNELS[kind.op_type]},
    }
