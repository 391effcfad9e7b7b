"""The attention of single layers in ONNX Runtime, without the model around it: caches, sessions,
steps.

Caches are written in place as in generation, over random keys and values, with every slot taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ssd_export.config import ModelConfig
from ssd_export.export.functions import (
    DOMAIN,
    OP_TYPE,
    AttentionNode,
    attention_function,
    eviction_nodes,
)
from ssd_export.export.operators import IR_VERSION, OPSET, Operators, onnx_dtype
from ssd_export.policy.schedule import eviction_kind
from ssd_export.policy.table import HeadGroup, PolicyTable
from ssd_export.runtime.ort_session import session_options

NOISE = 1_000_003  # random numbers that the arrays repeat


@dataclass
class GroupRun:
    """One head group's caches on the CPU, the session that steps them and the one that evicts (or
    None).
    """

    node: AttentionNode
    step: ort.InferenceSession
    evict: ort.InferenceSession | None
    values: dict[str, ort.OrtValue]
    bindings: dict[int, ort.IOBinding] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the group's cache tensors."""
        return sum(
            value.tensor_size_in_bytes()
            for name, value in self.values.items()
            if name.startswith("past_")
        )

    def run(self, position: int) -> None:
        """Runs the step of a position, after an eviction where one is due."""
        self.values["position"].update_inplace(
            np.full(self.values["position"].shape(), position, np.int32)
        )
        if self.evict is not None and (position - self.node.num_slots) % self.node.evict_every == 0:
            self._bound(self.evict)
        self._bound(self.step)

    def _bound(self, session: ort.InferenceSession) -> None:
        if id(session) not in self.bindings:
            binding = self.bindings[id(session)] = session.io_binding()
            for value in session.get_inputs():
                binding.bind_ortvalue_input(value.name, self.values[value.name])
            for value in session.get_outputs():
                binding.bind_ortvalue_output(
                    value.name, self.values[value.name.replace("present", "past")]
                )
        session.run_with_iobinding(self.bindings[id(session)])


def group_run(
    group: HeadGroup, table: PolicyTable, config: ModelConfig, rows: int, threads: int, seed: int
) -> GroupRun:
    """A head group with every slot taken, position p in slot p, so that each timed step has to
    evict.
    """
    node = AttentionNode.of(group, table, config.query_group_size, config.head_dim, "float32")
    heads, slots, dim, size = (
        group.num_heads,
        group.num_slots,
        config.head_dim,
        config.query_group_size,
    )
    shapes = {
        "query": (rows, heads * size, dim),
        "key": (rows, heads, dim),
        "value": (rows, heads, dim),
        "position": (rows,),
        "prompt_length": (rows,),
        "past_key": (rows, heads, slots, dim),
        "past_value": (rows, heads, slots, dim),
        "past_position": (rows, heads, slots),
        "past_score": (rows, heads, slots),
        "out": (rows, heads * size, dim),
    }
    if not group.rule.by_score:
        del shapes["past_score"]
    integers = ("position", "prompt_length", "past_position")
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(NOISE, np.float32)
    arrays = {
        name: np.resize(noise, shape) for name, shape in shapes.items() if name not in integers
    }
    if group.rule.by_score:
        arrays["past_score"] = np.abs(arrays["past_score"])
    arrays["past_position"] = np.broadcast_to(
        np.arange(slots, dtype=np.int32), shapes["past_position"]
    ).copy()
    arrays["position"] = np.zeros(rows, np.int32)
    arrays["prompt_length"] = np.full(rows, table.prompt_slots, np.int32)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    inputs = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(onnx_dtype("int32" if name in integers else "float32")),
        )
        for name, shape in shapes.items()
        if name != "out"
    }
    evict = None
    if eviction_kind(table, group) is not None:
        evict = _session(_eviction_model(node, inputs), 1)
    return GroupRun(node, _session(_step_model(node, inputs), threads), evict, values)


def _step_model(node: AttentionNode, inputs: dict[str, ir.Value]) -> ir.Model:
    ops = Operators()
    outputs = ops.many(
        OP_TYPE,
        *inputs.values(),
        domain=DOMAIN,
        num_outputs=4 + node.rule.by_score,
        **node.attributes(),
    )
    out_names = ["out"] + [
        f"present_{part}" for part in ("key", "value", "position", "score")[: len(outputs) - 1]
    ]
    for value, name in zip(outputs, out_names, strict=True):
        like = inputs["query" if name == "out" else name.replace("present", "past")]
        value.name, value.shape, value.type = name, like.shape, like.type
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=ops.tape.nodes,
        opset_imports={"": OPSET, DOMAIN: 1},
        name="step",
    )
    return ir.Model(graph, ir_version=IR_VERSION, functions=[attention_function(node, OP_TYPE)])


def _eviction_model(node: AttentionNode, inputs: dict[str, ir.Value]) -> ir.Model:
    ops = Operators()
    fresh = {
        name: ir.Value(name=name, shape=value.shape, type=value.type)
        for name, value in inputs.items()
    }
    score = fresh["past_score"] if node.rule.by_score else None
    position, _ = eviction_nodes(
        ops, node, fresh["position"], fresh["prompt_length"], fresh["past_position"], score
    )
    position.name, position.shape, position.type = (
        "present_position",
        fresh["past_position"].shape,
        fresh["past_position"].type,
    )
    used = [fresh["position"], fresh["prompt_length"], fresh["past_position"]] + (
        [score] if score else []
    )
    graph = ir.Graph(
        used, [position], nodes=ops.tape.nodes, opset_imports={"": OPSET}, name="evict"
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def _session(model: ir.Model, threads: int) -> ort.InferenceSession:
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        session_options(threads),
        providers=["CPUExecutionProvider"],
    )


class LayersRun:
    """The caches and sessions of some layers' head groups, stepped one after the other."""

    def __init__(
        self,
        table: PolicyTable,
        layers: Sequence[int],
        config: ModelConfig,
        rows: int,
        threads: int,
    ) -> None:
        groups = [group for layer in layers for group in table.layers[layer]]
        self._groups = [
            group_run(group, table, config, rows, threads, seed)
            for seed, group in enumerate(groups)
        ]
        self._num_layers = len(layers)
        self._step = 0

    @property
    def num_bytes(self) -> float:
        """Bytes that a step moves in the average layer."""
        return sum(group.num_bytes for group in self._groups) / self._num_layers

    def median_seconds(self, steps: int) -> tuple[float, float]:
        """(passed, computed by all threads) of one step of the average layer's attention, after two
        more to warm up.
        """
        seconds = []
        for _ in range(steps + 2):
            began = time.perf_counter(), time.process_time()
            for group in self._groups:
                # a full cache has its last slot rewritten: it is the first empty one until then
                group.run(
                    group.node.num_slots + self._step
                    if group.node.evicts
                    else group.node.num_slots - 1
                )
            spent = time.perf_counter() - began[0], time.process_time() - began[1]
            seconds.append(tuple(part / self._num_layers for part in spent))
            self._step += 1
        passed, computed = zip(*seconds[2:])
        return statistics.median(passed), statistics.median(computed)
