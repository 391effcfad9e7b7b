"""The plugin as a Python class: name, namespace, version, fields, outputs and aliases of the C++
one, for building alone.

It stands in for the library where TensorRT's headers are absent, so that how graphs map to the
plugin is tested everywhere. It has no kernel: an engine with it is inspected, never run.
"""

from __future__ import annotations

from typing import Any

from ssd_export.export.functions import DOMAIN, OP_TYPE

VERSION = "4"
PARTS = 3  # of the cache of a head group, beside the score
FIRST_CACHE = 3  # after heads, position, prompt_length
KERNELS = ("layer", "part", "sum")
LISTS = ("num_sinks", "num_recent", "by_score", "pinned_columns", "age_quota", "evict_every")
INTEGERS = (
    "grid_width",
    "kernel_head_dim",
    "kernel_max_slots",
    "kernel_block_slots",
    "kernel_max_splits",
    "kernel_num_warps",
    *(f"kernel_{kernel}_shared_bytes" for kernel in KERNELS),
)
REALS = ("score_decay",)
IMAGES = tuple(f"kernel_{kernel}_image" for kernel in KERNELS)
TEXTS = ("kernel_dtype", *(f"kernel_{kernel}_name" for kernel in KERNELS))


def register(trt: Any) -> Any:
    """Registers the creator with TensorRT; hold on to what is returned while anything is built."""
    creator = plugin_creator(trt)
    assert trt.get_plugin_registry().register_creator(creator, DOMAIN)
    return creator


def plugin_creator(trt: Any) -> Any:
    """The IPluginCreatorV3One of one module: tensorrt or tensorrt_rtx."""

    class Plugin(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime
    ):
        def __init__(self, fields: dict[str, Any]) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.fields = fields
            self.plugin_name, self.plugin_namespace, self.plugin_version = OP_TYPE, DOMAIN, VERSION
            parts = [PARTS + by_score for by_score in fields["by_score"]]
            self.num_outputs = 1 + sum(parts)  # attention out, then the caches
            firsts = (sum(parts[:place]) for place in range(len(parts)))
            self.keys = [FIRST_CACHE + first for first in firsts]

        def get_capability_interface(self, kind: Any) -> Plugin:
            return self

        def get_aliased_input(self, output: int) -> int:
            return FIRST_CACHE + output - 1 if output else -1

        def get_output_data_types(self, inputs: list[Any]) -> list[Any]:
            return [inputs[0], *inputs[FIRST_CACHE : FIRST_CACHE + self.num_outputs - 1]]

        def get_output_shapes(
            self, inputs: list[Any], shape_inputs: list[Any], expressions: Any
        ) -> list[Any]:
            out, kinds = trt.DimsExprs(inputs[0]), trt.DimensionOperation
            for key in self.keys:
                both = expressions.operation(kinds.PROD, expressions.constant(2), inputs[key][1])
                out[1] = expressions.operation(kinds.SUB, out[1], both)
            caches = range(FIRST_CACHE, FIRST_CACHE + self.num_outputs - 1)
            return [out, *(trt.DimsExprs(inputs[place]) for place in caches)]

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
            self.name, self.plugin_namespace, self.plugin_version = OP_TYPE, DOMAIN, VERSION
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, b"", kind) for name, kind in declared_fields(trt).items()]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Plugin:
            given = {field.name: field for field in fields}
            missing = declared_fields(trt).keys() - given.keys()
            if missing:
                raise ValueError(f"{name} lacks the fields {sorted(missing)}")
            return Plugin({"by_score": [int(one) for one in given["by_score"].data]})

    return Creator()


def declared_fields(trt: Any) -> dict[str, Any]:
    """Field name -> its type."""
    kinds = trt.PluginFieldType
    return {
        **dict.fromkeys((*LISTS, *INTEGERS), kinds.INT32),
        **dict.fromkeys(REALS, kinds.FLOAT32),
        **dict.fromkeys(IMAGES, kinds.INT8),
        **dict.fromkeys(TEXTS, kinds.CHAR),
    }
