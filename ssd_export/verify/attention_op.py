"""Rung `ops`: the attention functions and the evict graph that lie in the bundle, one step at a
time, against R3 to R7 in torch. Random caches, the same for both; no weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime import InferenceSession

from ssd_export.bundle import Bundle
from ssd_export.bundle.graphs import cache_parts, head_groups, part_names
from ssd_export.cache.attention import decode_attention, evict_full_heads
from ssd_export.cache.quantized_rows import quantize_rows
from ssd_export.cache.state import EMPTY, GroupState
from ssd_export.config import ModelConfig
from ssd_export.export.functions import DOMAIN
from ssd_export.export.operators import IR_VERSION, OPSET, onnx_dtype
from ssd_export.graph_spec import CacheTensor
from ssd_export.policy.table import HeadGroup, PolicyTable
from ssd_export.runtime.ort_session import open_session
from ssd_export.verify.checks import Divergence, Rung
from ssd_export.verify.contract import heads_of_layer
from ssd_export.verify.tolerances import ONE_CODE, TOLERANCES, error

ROWS = 2
SCORE_GAP = 0.05  # between tokens of neighboring positions


def check_ops(bundle: Bundle, provider: str = "cpu") -> Rung:
    """Each different attention function of decode_step over two evictions, then the evict graph."""
    dtype = bundle.config.dtype
    if dtype == "bfloat16":
        return Rung("ops", {"skipped": "numpy has no bfloat16 to feed a single operator with"})
    table, config = bundle.config.policy, bundle.config.model
    greatest, num_functions = 0.0, 0
    for layer, index, node, function in _functions(ir.load(bundle.file("onnx/decode_step.onnx"))):
        num_functions += 1
        group = table.layers[layer][index]
        worst, divergence = _check_function(node, function, group, table, config, dtype, provider)
        greatest = max(greatest, worst)
        if divergence:
            head = _head(table, layer, index, divergence.head)
            return Rung(
                "ops",
                {},
                Divergence(**{**vars(divergence), "layer": layer, "group": index, "head": head}),
            )
    figures = {
        "functions": num_functions,
        "greatest_error": greatest,
        "evict_graph": "evict" in bundle.config.graphs,
    }
    return Rung(
        "ops",
        figures,
        _check_evict(bundle, table, config, provider) if figures["evict_graph"] else None,
    )


def _functions(model: ir.Model) -> Iterator[tuple[int, int, ir.Node, ir.Function]]:
    """(layer, group, node, function) of the first use of each attention function."""
    seen = set()
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type not in seen:
            seen.add(node.op_type)
            cache = next(
                filter(
                    None, (CacheTensor.parse(value.name or "") for value in node.inputs if value)
                )
            )
            yield cache.layer, cache.group, node, model.functions[node.op_identifier()]


def _head(table: PolicyTable, layer: int, group: int, place: int | None) -> int | None:
    """The checkpoint's number of a head by its place in the group."""
    heads = [head for index, _, head in heads_of_layer(table, layer) if index == group]
    return None if place is None else heads[place]


def _check_function(
    node: ir.Node,
    function: ir.Function,
    group: HeadGroup,
    table: PolicyTable,
    config: ModelConfig,
    dtype: str,
    provider: str,
) -> tuple[float, Divergence | None]:
    """(greatest error, first divergence with the head's place in the group)."""
    tolerance, greatest = TOLERANCES[dtype].op, 0.0
    rng = np.random.default_rng(0)
    session = _single_node_session(node, function, group, config, dtype, table.kv_dtype, provider)
    lengths = torch.tensor([table.prompt_slots, max(1, table.prompt_slots // 2)], dtype=torch.int32)
    room = 2  # empty slots of row 0; row 1 has one more, so that rows evict at different steps
    fills = group.can_fill(table.prompt_slots, table.grid)
    num_steps = room + 2 * group.evict_every + 1 if fills else room
    state, position = _state(rng, group, config, dtype, lengths, room, num_steps, table.kv_dtype)
    for step in range(num_steps):
        (
            evict_full_heads(state, table.of_group(group), lengths, position)
            if group.evict_every > 1
            else None
        )
        query, key, value = (
            _random(rng, (ROWS, heads, config.head_dim), dtype)
            for heads in (
                group.num_heads * config.query_group_size,
                group.num_heads,
                group.num_heads,
            )
        )
        parts = part_names(group.rule, table.kv_dtype)
        past = [getattr(state, part).clone() for part in parts]
        found = session.run(
            None,
            {
                f"in{i}": np.ascontiguousarray(t.numpy())
                for i, t in enumerate([query, key, value, position, lengths, *past])
            },
        )
        out = decode_attention(query, key, value, state, table.of_group(group), lengths, position)
        wanted = [out.unflatten(1, (group.num_heads, -1))] + [
            getattr(state, part) for part in parts
        ]
        found[0] = found[0].reshape(wanted[0].shape)
        for what, ours, reference in zip(("attention out", *parts), found, wanted):
            allowed = (
                0.0
                if what == "position"
                else max(tolerance, ONE_CODE)
                if ours.dtype == np.int8
                else tolerance
            )
            for head in range(group.num_heads):
                size = error(ours[:, head], reference[:, head].numpy())
                greatest = max(greatest, size if what != "position" else 0.0)
                if size > allowed:
                    return greatest, Divergence(
                        f"attention function: {what}", step, head=head, error=size, allowed=allowed
                    )
        position = position + 1
    return greatest, None


def _single_node_session(
    node: ir.Node,
    function: ir.Function,
    group: HeadGroup,
    config: ModelConfig,
    dtype: str,
    kv_dtype: str,
    provider: str,
) -> InferenceSession:
    """An ONNX Runtime session of one node with the bundle's function as its body; inputs in0, in1,
    ...
    """
    heads, dim = group.num_heads, config.head_dim
    shapes = [
        (ROWS, heads * config.query_group_size, dim),
        (ROWS, heads, dim),
        (ROWS, heads, dim),
        (ROWS,),
        (ROWS,),
    ]
    dtypes = [dtype] * 3 + ["int32"] * 2
    for _, spec in cache_parts(group, config, dtype, group.num_slots, kv_dtype):
        shapes.append(spec.sizes({"rows": ROWS}))
        dtypes.append(spec.dtype)
    inputs = [
        ir.Value(name=f"in{i}", shape=ir.Shape(shape), type=ir.TensorType(onnx_dtype(kind)))
        for i, (shape, kind) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    single = ir.Node(
        DOMAIN, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs)
    )
    for i, (output, kind) in enumerate(zip(single.outputs, [dtype, *dtypes[5:]], strict=True)):
        output.name, output.type = f"out{i}", ir.TensorType(onnx_dtype(kind))
    graph = ir.Graph(
        inputs, single.outputs, nodes=[single], opset_imports={"": OPSET, DOMAIN: 1}, name="op"
    )
    model = ir.Model(graph, ir_version=IR_VERSION, functions=[function])
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "op.onnx")
        return open_session(Path(folder) / "op.onnx", provider, 1)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(getattr(torch, dtype))


def _state(
    rng: np.random.Generator,
    group: HeadGroup,
    config: ModelConfig,
    dtype: str,
    lengths: torch.Tensor,
    room: int,
    num_steps: int,
    kv_dtype: str = "model",
) -> tuple[GroupState, torch.Tensor]:
    """A cache late in an image, and the position of the next token: the prompt and the newest
    image tokens in shuffled slots; row b has room + b empty slots. In row 0 the newest tokens score
    least and in row 1 the oldest, so that the edges of what R3 protects decide what is evicted."""
    state = GroupState.empty(ROWS, group, config.head_dim, getattr(torch, dtype), kv_dtype=kv_dtype)
    state.key, state.value = (_random(rng, tuple(state.key.shape), dtype) for _ in range(2))
    if kv_dtype == "int8":
        (state.key, state.key_scale), (state.value, state.value_scale) = map(
            quantize_rows, (state.key, state.value)
        )
    position = lengths + (config.grid.num_tokens - num_steps)
    for row in range(ROWS):
        length, newest = int(lengths[row]), int(position[row])
        num_images = min(max(group.num_slots - room - row - length, 0), newest - length)
        held = [*range(length), *range(newest - num_images, newest)]
        for head in range(group.num_heads):
            slots = rng.permutation(group.num_slots)[: len(held)]
            state.position[row, head, torch.from_numpy(slots)] = torch.tensor(
                held, dtype=torch.int32
            )
    if state.score is not None:
        age = torch.stack([position[0] - state.position[0], state.position[1]]).float()
        state.score = age * SCORE_GAP + torch.from_numpy(
            rng.random(tuple(age.shape)).astype(np.float32)
        ) * (SCORE_GAP / 2)
    return state, position


def _check_evict(
    bundle: Bundle, table: PolicyTable, config: ModelConfig, provider: str
) -> Divergence | None:
    """The evict graph on caches of which row 0 is full and row 1 is not."""
    spec = bundle.config.graphs["evict"]
    wanted = {tensor.name for tensor in spec.inputs}
    rng = np.random.default_rng(1)
    lengths = torch.tensor([table.prompt_slots, max(1, table.prompt_slots // 2)], dtype=torch.int32)
    states, step = {}, table.grid.num_tokens - 1
    feeds = {"step": np.array([step], np.int64), "prompt_length": lengths.numpy()}
    for layer, index, group in head_groups(table):
        if CacheTensor(layer, index, "position").past not in wanted:
            continue
        state, position = _state(
            rng, group, config, bundle.config.dtype, lengths, room=0, num_steps=1
        )
        position = lengths + (step - 1)
        states[layer, index] = state
        for part in ("position", "score"):
            if CacheTensor(layer, index, part).past in wanted:
                feeds[CacheTensor(layer, index, part).past] = getattr(state, part).numpy().copy()
        evict_full_heads(state, table.of_group(group), lengths, position)
    names = [tensor.name for tensor in spec.outputs]
    found = dict(
        zip(
            names,
            open_session(bundle.file("onnx/evict.onnx"), provider, 1).run(names, feeds),
            strict=True,
        )
    )
    for (layer, index), state in states.items():
        ours, reference = (
            found[CacheTensor(layer, index, "position").present],
            state.position.numpy(),
        )
        if not np.array_equal(ours, reference):
            head = int(np.argwhere((ours != reference).any(axis=(0, 2)))[0, 0])
            what = (
                f"evict graph: {int((ours == EMPTY).sum())} slots are empty afterwards, by the"
                f" rules {int((reference == EMPTY).sum())}"
                if (ours == EMPTY).sum() != (reference == EMPTY).sum()
                else "evict graph: other tokens are evicted"
            )
            return Divergence(what, layer=layer, group=index, head=_head(table, layer, index, head))
    return None
