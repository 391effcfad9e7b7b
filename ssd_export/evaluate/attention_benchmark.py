"""Times the attention of one decode step of one layer in ONNX Runtime: a compressed cache against a full one.

    python -m ssd_export.evaluate.attention_benchmark --head-map janus-pro-1b --images 32

Both caches are run in turn in the same process, written in place as in generation, over random keys and values; the
figure is the median over the steps, and the ratio of the two medians. A step includes the releases that fall due.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass, field

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ssd_export.cache.head_map import find_head_map
from ssd_export.cache.policy import make_policy
from ssd_export.cache.table import HeadGroup, PolicyTable, releases_between_steps
from ssd_export.config import ModelConfig, VQConfig
from ssd_export.export.functions import DOMAIN, OP_TYPE, AttentionNode, attention_function, release_nodes
from ssd_export.export.operators import DTYPES, IR_VERSION, OPSET, Operators

SHAPES = {  # layers, heads, hidden size
    "janus-pro-1b": (24, 16, 2048, 5632),
    "janus-pro-7b": (30, 32, 4096, 11008),
}


def shape_config(name: str) -> ModelConfig:
    """The published shape of a Janus-Pro, without its weights."""
    layers, heads, hidden, intermediate = SHAPES[name]
    return ModelConfig(102400, hidden, layers, heads, heads, 128, intermediate, 10000.0, 1e-6, 16384, 16384, 8,
                       VQConfig(256, 128, (1, 1, 2, 2, 4), 2), 384)  # fmt: skip


@dataclass
class GroupRun:
    """One head group's caches on the CPU, the session that steps them and the one that releases (or None)."""

    node: AttentionNode
    step: ort.InferenceSession
    release: ort.InferenceSession | None
    values: dict[str, ort.OrtValue]
    bindings: dict[int, ort.IOBinding] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for name, value in self.values.items() if name.startswith("past_"))

    def run(self, position: int) -> None:
        self.values["position"].update_inplace(np.full(self.values["position"].shape(), position, np.int32))
        if self.release is not None and (position - self.node.num_slots) % self.node.evict_every == 0:
            self._bound(self.release)
        self._bound(self.step)

    def _bound(self, session: ort.InferenceSession) -> None:
        if id(session) not in self.bindings:
            binding = self.bindings[id(session)] = session.io_binding()
            for value in session.get_inputs():
                binding.bind_ortvalue_input(value.name, self.values[value.name])
            for value in session.get_outputs():
                binding.bind_ortvalue_output(value.name, self.values[value.name.replace("present", "past")])
        session.run_with_iobinding(self.bindings[id(session)])


def group_run(group: HeadGroup, table: PolicyTable, config: ModelConfig, rows: int, threads: int, seed: int) -> GroupRun:
    """A head group with every slot taken, position p in slot p, so that each timed step has to release."""
    node = AttentionNode.of(group, table, config.query_group_size, config.head_dim, "float32")
    heads, slots, dim, size = group.num_heads, group.num_slots, config.head_dim, config.query_group_size
    shapes = {
        "query": (rows, heads * size, dim), "key": (rows, heads, dim), "value": (rows, heads, dim),
        "position": (rows,), "prompt_length": (rows,), "past_key": (rows, heads, slots, dim),
        "past_value": (rows, heads, slots, dim), "past_position": (rows, heads, slots), "past_score": (rows, heads, slots),
        "out": (rows, heads * size, dim),
    }  # fmt: skip
    integers = ("position", "prompt_length", "past_position")
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items() if name not in integers}
    arrays["past_score"] = np.abs(arrays["past_score"])
    arrays["past_position"] = np.broadcast_to(np.arange(slots, dtype=np.int32), shapes["past_position"]).copy()
    arrays["position"] = np.zeros(rows, np.int32)
    arrays["prompt_length"] = np.full(rows, table.prompt_slots, np.int32)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    inputs = {name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(DTYPES["int32" if name in integers else "float32"]))
              for name, shape in shapes.items() if name != "out"}  # fmt: skip
    release = None
    if releases_between_steps(group, table.prompt_slots):
        release = _session(_release_model(node, inputs), threads)
    return GroupRun(node, _session(_step_model(node, inputs), threads), release, values)


def _step_model(node: AttentionNode, inputs: dict[str, ir.Value]) -> ir.Model:
    ops = Operators()
    names = [name for name in inputs if node.rule.by_score or name != "past_score"]
    outputs = ops.many(OP_TYPE, *(inputs[name] for name in names), domain=DOMAIN,
                       num_outputs=4 + node.rule.by_score, **node.attributes())  # fmt: skip
    out_names = ["out"] + [f"present_{part}" for part in ("key", "value", "position", "score")[: len(outputs) - 1]]
    for value, name in zip(outputs, out_names, strict=True):
        like = inputs["query" if name == "out" else name.replace("present", "past")]
        value.name, value.shape, value.type = name, like.shape, like.type
    graph = ir.Graph([inputs[name] for name in names], outputs, nodes=ops.tape.nodes, opset_imports={"": OPSET, DOMAIN: 1}, name="step")
    return ir.Model(graph, ir_version=IR_VERSION, functions=[attention_function(node, OP_TYPE)])


def _release_model(node: AttentionNode, inputs: dict[str, ir.Value]) -> ir.Model:
    ops = Operators()
    fresh = {name: ir.Value(name=name, shape=value.shape, type=value.type) for name, value in inputs.items()}
    score = fresh["past_score"] if node.rule.by_score else None
    position, _ = release_nodes(ops, node, fresh["position"], fresh["prompt_length"], fresh["past_position"], score)
    position.name, position.shape, position.type = "present_position", fresh["past_position"].shape, fresh["past_position"].type
    used = [fresh["position"], fresh["prompt_length"], fresh["past_position"]] + ([score] if score else [])
    graph = ir.Graph(used, [position], nodes=ops.tape.nodes, opset_imports={"": OPSET}, name="release")
    return ir.Model(graph, ir_version=IR_VERSION)


def _session(model: ir.Model, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def time_layer(table: PolicyTable, layer: int, config: ModelConfig, rows: int, steps: int, threads: int) -> tuple[float, int]:
    """(median seconds of a layer's attention in one step, cache bytes)."""
    groups = [group_run(group, table, config, rows, threads, seed) for seed, group in enumerate(table.layers[layer])]
    full = max(group.num_slots for group in table.layers[layer])
    seconds = []
    for step in range(steps + 2):
        began = time.perf_counter()
        for run in groups:
            # a full cache has its last slots rewritten: position 0 is the oldest and its slot the arg-min
            run.run(run.node.num_slots + step if run.node.releases else full - 1)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:]), sum(run.num_bytes for run in groups)


@click.command()
@click.option("--head-map", "shape", type=click.Choice(list(SHAPES)), default="janus-pro-1b", show_default=True)
@click.option("--images", default=32, show_default=True, help="Pictures at once; a step has twice as many rows.")
@click.option("--budget", default=0.2, show_default=True)
@click.option("--policy", default="ssd-row", show_default=True)
@click.option("--layer", default=12, show_default=True)
@click.option("--steps", default=48, show_default=True, help="Timed steps of each cache.")
@click.option("--threads", default=1, show_default=True)
def main(shape: str, images: int, budget: float, policy: str, layer: int, steps: int, threads: int) -> None:
    """Prints milliseconds a step, cache bytes and the ratio, for one layer."""
    config = shape_config(shape)
    tables = {
        "full": make_policy("full", config, budget=1.0),
        f"{policy} {budget:g}": make_policy(policy, config, budget=budget, head_map=find_head_map(config)),
    }
    print(f"{shape} layer {layer}, {images} images, fp32, {threads} thread(s), onnxruntime {ort.__version__}, "
          f"{platform.machine()}, median of {steps} steps")  # fmt: skip
    medians = []
    for name, table in tables.items():
        seconds, num_bytes = time_layer(table, layer, config, 2 * images, steps, threads)
        medians.append(seconds)
        slots = ", ".join(f"{group.num_heads} x {group.num_slots}" for group in table.layers[layer])
        print(f"{name:14} {1000 * seconds:8.2f} ms  {num_bytes / 2**20:8.1f} MiB  heads x slots: {slots}")
    print(f"ratio {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
