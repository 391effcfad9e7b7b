"""Graphs stay right in any order of their nodes with caches written in place: what reads a buffer
comes before what overwrites it by data dependency, not by luck."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.graph_spec import GraphSpec
from ssd_export.tensorrt.step_form import AS_BUNDLED, in_place
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file
from tests.tensorrt.any_order import AnyOrder

TINY = TinyJanus(num_layers=1, num_heads=2, num_kv_heads=2, seed=3)
NUM_ORDERS, ROWS = 3, 2
DTYPES = {"float32": np.float32, "int32": np.int32, "int64": np.int64, "int8": np.int8}


def opened(policy: str) -> Bundle:
    model = checkpoint(TINY)
    return open_bundle(bundle(model, policy, 0.1, head_map=str(head_map_file(model))))


def full_caches(spec: GraphSpec, numbers: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs of a graph: every head but the last has no empty slot, so that evictions happen."""
    sizes = {"rows": ROWS, "images": ROWS // 2}
    values = {}
    for tensor in spec.inputs:
        shape = tuple(sizes.get(dimension, dimension) for dimension in tensor.shape)
        if tensor.name.endswith(".position"):
            order = np.argsort(numbers.random(shape), axis=-1).astype(np.int32)
            order[:, -1, 0] = -1
            values[tensor.name] = order
        else:
            values[tensor.name] = numbers.random(shape).astype(DTYPES[tensor.dtype])
    most = max(value.max() for name, value in values.items() if name.endswith(".position"))
    fixed = {"prompt_length": np.full(ROWS, 2, np.int32), "step": np.array([most], np.int64)}
    fixed |= {"cfg_scale": np.array([5], np.float32), "temperature": np.array([1], np.float32)}
    return values | {name: value for name, value in fixed.items() if name in values}


EVICT_BETWEEN_STEPS = ("ssd-row", "linear")
GRAPHS = [(policy, "decode_step") for policy in (*EVICT_BETWEEN_STEPS, "h2o", "tova", "margin")]
GRAPHS += [(policy, "evict") for policy in EVICT_BETWEEN_STEPS]


@pytest.mark.parametrize("policy, graph", GRAPHS)
@pytest.mark.parametrize("by", ["onnxruntime", "an engine"])
def test_any_order_gives_the_same(policy: str, graph: str, by: str) -> None:
    made = opened(policy)
    spec = made.config.graphs[graph]
    shared = spec.aliases if by == "onnxruntime" else in_place(spec, AS_BUNDLED)
    runner = AnyOrder(str(made.file(f"onnx/{graph}.onnx")))
    given = full_caches(spec, np.random.default_rng(0))
    wanted = runner.run({name: value.copy() for name, value in given.items()}, {}, Random(0))
    for seed in range(NUM_ORDERS):
        buffers = {name: value.copy() for name, value in given.items()}
        found = runner.run(buffers, shared, Random(seed))
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, f"{name}, order {seed}")


def test_a_graph_that_is_right_by_luck_is_found(tmp_path: Path) -> None:
    """Reads the old positions beside the write: as the first form of the decode step did."""
    nodes = [
        helper.make_node("Add", ["past", "one"], ["present"]),
        helper.make_node("Mul", ["past", "past"], ["squares"]),
    ]
    tensors = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, (3,))
        for name in ("past", "one", "present", "squares")
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [tensors["past"], tensors["one"]],
        [tensors["present"], tensors["squares"]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "luck.onnx")
    runner = AnyOrder(str(tmp_path / "luck.onnx"))
    given = {"past": np.arange(3, dtype=np.float32), "one": np.ones(3, np.float32)}
    squares = set()
    for seed in range(8):
        buffers = {name: value.copy() for name, value in given.items()}
        squares.add(tuple(runner.run(buffers, {"present": "past"}, Random(seed))["squares"]))
    assert squares == {(0, 1, 4), (1, 4, 9)}
