"""Decode attention over a head group's slots as one ONNX node, and the local function that gives it
a body.

The node `ssd_export::DecodeAttention*` is R3 to R7 for one head group of one layer. With the
function in the model, ONNX Runtime and plain TensorRT inline ordinary operators; for the TensorRT
plugin of that name the nodes of a layer become one (plugin_flavor.py). Rules are told in
policy/__init__.py.

Inputs:  query [B, H*G, D], key, value [B, H, D] after RoPE, position int32 [B] of the new token,
         prompt_length int32 [B], past_key, past_value [B, H, S, D], past_position int32 [B, H, S],
         and past_score float32 [B, H, S] where the group ranks by score. With keys and values in
         int8 (cache/quantized_rows.py) past_key_scale and past_value_scale float32 [B, H, S] follow
         past_value.
Outputs: out [B, H*G, D], then the present_* of the past_* inputs, which may share their memory:
everything that
         reads a past tensor comes before the write into it, by data dependency.

A function body evicts in the step only where evict_every is 1 (one slot: an arg-min). A group
that evicts more at a time has an empty slot whenever the step runs, because the evict graph ran
before; the plugin does both itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import onnx_ir as ir

from ssd_export.bundle.graphs import part_names
from ssd_export.export.operators import OPSET, Operators
from ssd_export.policy.table import (
    GREATEST_CODE,
    LEAST_SCALE,
    HeadGroup,
    PolicyTable,
    Rule,
    pinned_bits,
)

DOMAIN = "ssd_export"
OP_TYPE = "DecodeAttention"
PROTECTED = 3.0e38


@dataclass(frozen=True)
class AttentionNode:
    """Parameters of the node of one head group; equal ones share a function.

    dtype: of what is computed; kv_dtype: of the cache's keys and values, where it is another one.
    """

    rule: Rule
    num_slots: int
    num_heads: int
    evict_every: int
    score_decay: float
    query_group_size: int
    head_dim: int
    dtype: str
    evicts: bool  # False where the cache can never be full
    grid_width: int
    kv_dtype: str = "model"

    @classmethod
    def of(
        cls, group: HeadGroup, table: PolicyTable, query_group_size: int, head_dim: int, dtype: str
    ) -> AttentionNode:
        """The node of a head group of a policy table."""
        return cls(
            group.rule,
            group.num_slots,
            group.num_heads,
            group.evict_every,
            table.score_decay,
            query_group_size,
            head_dim,
            dtype,
            group.can_fill(table.prompt_slots, table.grid),
            table.grid.width,
            table.kv_dtype,
        )

    def attributes(self) -> dict[str, int | float]:
        """Attributes of the node that the plugin reads."""
        return {
            "num_sinks": self.rule.num_sinks,
            "num_recent": self.rule.num_recent,
            "by_score": int(self.rule.by_score),
            "pinned_columns": pinned_bits(self.rule.pinned_columns),
            "grid_width": self.grid_width,
            "evict_every": self.evict_every,
            "score_decay": float(self.score_decay),
            **({"age_quota": 1} if self.rule.age_quota else {}),  # the plugin's default is 0
        }


@dataclass(frozen=True)
class NodeInputs:
    """Inputs of the node: query [B, H*G, D]; key, value [B, H, D]; position, prompt_length int [B];
    past: the cache by part.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    position: ir.Value
    prompt_length: ir.Value
    past: dict[str, ir.Value]

    @classmethod
    def of(cls, node: AttentionNode) -> NodeInputs:
        """Values named as the node's inputs, in their order."""
        query, key, value, position, prompt_length = (
            ir.Value(name=name) for name in ("query", "key", "value", "position", "prompt_length")
        )
        parts = part_names(node.rule, node.kv_dtype)
        past = {part: ir.Value(name=f"past_{part}") for part in parts}
        return cls(query, key, value, position, prompt_length, past)

    def all(self) -> list[ir.Value]:
        """The inputs in order."""
        token = [self.query, self.key, self.value, self.position, self.prompt_length]
        return [*token, *self.past.values()]


# Records the operators of a node and returns its outputs: out, then the cache's parts.
Body = Callable[[Operators, AttentionNode, NodeInputs], list[ir.Value]]


def attention_function(node: AttentionNode, op_type: str, opset: int = OPSET) -> ir.Function:
    """The local function `ssd_export::op_type` in the form that the bundle has; opset is its
    model's.
    """
    return local_function(node, op_type, opset, _body)


def local_function(node: AttentionNode, op_type: str, opset: int, body: Body) -> ir.Function:
    """The local function `ssd_export::op_type` with a body of ordinary operators."""
    inputs, ops = NodeInputs.of(node), Operators()
    outputs = body(ops, node, inputs)
    graph = ir.Graph(
        inputs.all(), outputs, nodes=ops.tape.nodes, opset_imports={"": opset}, name=op_type
    )
    attributes = [
        ir.Attr(
            name, ir.AttributeType.FLOAT if isinstance(value, float) else ir.AttributeType.INT, None
        )
        for name, value in node.attributes().items()
    ]
    return ir.Function(DOMAIN, op_type, graph=graph, attributes=attributes)


def _body(ops: Operators, node: AttentionNode, inputs: NodeInputs) -> list[ir.Value]:
    past, query = inputs.past, inputs.query
    past_position, past_score = past["position"], past.get("score")
    place = _head_places(ops, node, inputs.prompt_length)  # [B, H, 2]
    new_position = ops.op(
        "Expand", ops.reshape(inputs.position, [-1, 1]), ops.constant([1, node.num_heads])
    )  # [B, H]
    position, prompt_length = (
        ops.reshape(row, [-1, 1, 1]) for row in (inputs.position, inputs.prompt_length)
    )
    slot, has_room = find_slot(
        ops, node, position, prompt_length, past_position, past_score
    )  # [B, H, 1] each
    row = ops.op("Concat", place, slot, axis=-1)
    new = {"key": inputs.key, "value": inputs.value, "position": new_position}
    if node.kv_dtype == "int8":
        for part in ("key", "value"):
            new[part], new[f"{part}_scale"] = quantize_rows(ops, new[part], node.dtype)
    present = {part: ops.op("ScatterND", past[part], row, rows) for part, rows in new.items()}
    probs = _softmax_over_slots(
        ops, node, query, present
    )  # float32 [B, H, S], or [B, H, G, S] where G > 1
    out = ops.reshape(_weighted_values(ops, node, probs, present), [0, -1, node.head_dim])
    if past_score is not None:
        started = ops.op("Mul", ops.cast(new_position, "float32"), ops.constant(0.0, "float32"))
        present["score"] = _present_score(ops, node, past_score, has_room, (row, started), probs)
    return [out, *(present[part] for part in past)]


def _for_each_query(ops: Operators, node: AttentionNode, of_slots: ir.Value) -> ir.Value:
    """[B, H, S] as it stands beside the probabilities."""
    return (
        of_slots if node.query_group_size == 1 else ops.reshape(of_slots, [0, 0, 1, node.num_slots])
    )


def quantize_rows(ops: Operators, rows: ir.Value, dtype: str) -> tuple[ir.Value, ir.Value]:
    """Codes int8 [..., D] and scales float32 [...] of rows [..., D], as cache/quantized_rows.py
    makes them.
    """
    wide = rows if dtype == "float32" else ops.cast(rows, "float32")
    scale = ops.op("ReduceMax", ops.op("Abs", wide), ops.constant([-1]), keepdims=1)
    factor = ops.op(
        "Div",
        ops.constant(GREATEST_CODE, "float32"),
        ops.op("Max", scale, ops.constant(LEAST_SCALE, "float32")),
    )
    codes = ops.cast(ops.op("Round", ops.op("Mul", wide, factor)), "int8")
    return codes, ops.op("Squeeze", scale, ops.constant([-1]))


def _weighted_values(
    ops: Operators, node: AttentionNode, probs: ir.Value, present: dict[str, ir.Value]
) -> ir.Value:
    """[B, H, G, D]."""
    value, is_int8 = present["value"], node.kv_dtype == "int8"
    if is_int8:
        probs = ops.op("Mul", probs, _for_each_query(ops, node, present["value_scale"]))
        value = ops.cast(value, node.dtype)
    weights = probs if node.dtype == "float32" else ops.cast(probs, node.dtype)
    if node.query_group_size == 1:
        weights = ops.reshape(weights, [0, 0, 1, node.num_slots])
    out = ops.op("MatMul", weights, value)
    return ops.op("Mul", out, ops.constant(1 / GREATEST_CODE, node.dtype)) if is_int8 else out


def _head_places(ops: Operators, node: AttentionNode, prompt_length: ir.Value) -> ir.Value:
    """(row, head) of every head, int64 [B, H, 2]: from the batch size alone, so that all layers
    share one.
    """
    rows = ops.op(
        "Squeeze", ops.op("Shape", prompt_length)
    )  # no constant: ONNX Runtime does not see that two empty ones are equal
    row = ops.reshape(ops.op("Range", ops.constant(0), rows, ops.constant(1)), [-1, 1, 1])
    heads = [[[0, head] for head in range(node.num_heads)]]
    return ops.op("Add", ops.op("Mul", row, ops.constant([[[1, 0]]])), ops.constant(heads))


def _softmax_over_slots(
    ops: Operators, node: AttentionNode, query: ir.Value, present: dict[str, ir.Value]
) -> ir.Value:
    """Keys times query, not query times keys: with one query head the product is a matrix times a
    vector as stored.
    """
    group, head_dim, is_int8 = node.query_group_size, node.head_dim, node.kv_dtype == "int8"
    key = ops.cast(present["key"], node.dtype) if is_int8 else present["key"]
    factor = head_dim**-0.5 / (GREATEST_CODE if is_int8 else 1)
    scaled = ops.op("Mul", query, ops.constant(factor, node.dtype))
    if group == 1:
        columns = ops.reshape(scaled, [0, 0, head_dim, 1])
        logits = ops.reshape(ops.op("MatMul", key, columns), [0, 0, node.num_slots])
    else:
        columns = ops.op(
            "Transpose",
            ops.reshape(scaled, [0, node.num_heads, group, head_dim]),
            perm=[0, 1, 3, 2],
        )
        logits = ops.op("Transpose", ops.op("MatMul", key, columns), perm=[0, 1, 3, 2])
    if node.dtype != "float32":
        logits = ops.cast(logits, "float32")
    if is_int8:
        logits = ops.op("Mul", logits, _for_each_query(ops, node, present["key_scale"]))
    empty = ops.op(
        "Less", _for_each_query(ops, node, present["position"]), ops.constant(0, "int32")
    )
    return ops.op(
        "Softmax", ops.op("Where", empty, ops.constant(-PROTECTED, "float32"), logits), axis=-1
    )


def _present_score(
    ops: Operators,
    node: AttentionNode,
    past_score: ir.Value,
    has_room: ir.Value | None,
    start: tuple[ir.Value, ir.Value],
    probs: ir.Value,
) -> ir.Value:
    """Scores after the step. start: the new token's place, as ScatterND counts, and its first
    score.
    """
    received = (
        probs
        if node.query_group_size == 1
        else ops.op("ReduceSum", probs, ops.constant([2]), keepdims=0)
    )
    if has_room is not None and node.score_decay != 1:
        kept = ops.op(
            "Where",
            has_room,
            ops.constant(1.0, "float32"),
            ops.constant(node.score_decay, "float32"),
        )
        past_score = ops.op("Mul", past_score, kept)
    return ops.op("Add", ops.op("ScatterND", past_score, *start), received)


def find_slot(
    ops: Operators,
    node: AttentionNode,
    position: ir.Value,
    prompt_length: ir.Value,
    past_position: ir.Value,
    past_score: ir.Value | None,
) -> tuple[ir.Value, ir.Value | None]:
    """int64 [B, H, 1]: the lowest empty slot (R6), else the slot of least retention (R5).

    And, where the step evicts by score: bool [B, H, 1], whether the head had an empty slot. It is
    read off the ranks, not off past_position, which the write into present_position may have
    overwritten by then.
    """
    rule = node.rule
    if not ranks_in_step(node):
        return ops.op(
            "ArgMin", past_position, axis=-1
        ), None  # the first -1; without empty slots the oldest token
    rank = _rank(ops, rule, past_score, past_position)
    rank = _protect(ops, node, rank, position, prompt_length, past_position)
    if rule.age_quota:
        rank, _ = _halves(ops, node, rank, position, past_position)
    empty = ops.op("Less", past_position, ops.constant(0, "int32"))
    rank = ops.op("Where", empty, ops.constant(-1.0, "float32"), rank)
    lowest = ops.op("ReduceMin", rank, ops.constant([-1]))
    return ops.op("ArgMin", rank, axis=-1), ops.op("Less", lowest, ops.constant(0.0, "float32"))


def ranks_in_step(node: AttentionNode) -> bool:
    """Whether the step itself looks for the token of least retention. Else there is an empty slot,
    or the oldest token goes.
    """
    rule = node.rule
    is_ring = not (rule.by_score or rule.age_quota or _protects(rule))
    return node.evicts and node.evict_every == 1 and not is_ring


def _protects(rule: Rule) -> bool:
    return rule.num_sinks != 0 or rule.num_recent > 1 or rule.pinned_columns != 0


def _rank(ops: Operators, rule: Rule, score: ir.Value | None, position: ir.Value) -> ir.Value:
    """The number by which R3 ranks unprotected tokens, float32 [B, H, S]."""
    if not rule.by_score:
        return ops.cast(position, "float32")
    assert score is not None
    return score


def _protect(
    ops: Operators,
    node: AttentionNode,
    rank: ir.Value,
    position: ir.Value,
    prompt_length: ir.Value,
    past_position: ir.Value,
) -> ir.Value:
    """rank where R3 does not protect, PROTECTED where it does (empty slots count as sinks here;
    callers see to them).
    """
    protected, rule = [], node.rule
    if rule.num_sinks != 0:
        sinks = prompt_length if rule.num_sinks < 0 else ops.constant(rule.num_sinks, "int32")
        protected.append(ops.op("Less", past_position, sinks))
    if rule.num_recent > 1:
        oldest = ops.op("Sub", position, ops.constant(rule.num_recent, "int32"))
        protected.append(ops.op("Greater", past_position, oldest))
    if rule.pinned_columns:
        protected.append(_in_pinned_column(ops, node, prompt_length, past_position))
    if not protected:
        return rank
    # one Where for all: it is three passes in ONNX Runtime, Or is one
    return ops.op(
        "Where", reduce(partial(ops.op, "Or"), protected), ops.constant(PROTECTED, "float32"), rank
    )


def _in_pinned_column(
    ops: Operators, node: AttentionNode, prompt_length: ir.Value, past_position: ir.Value
) -> ir.Value:
    """Prompt tokens have a negative index; they are looked up as a column after the last, which is
    never pinned.
    """
    width = node.grid_width
    index = ops.op("Sub", past_position, prompt_length)
    column = ops.op("Mod", index, ops.constant(width, "int32"))
    is_prompt = ops.op("Less", index, ops.constant(0, "int32"))
    pinned = [bool(node.rule.pinned_columns >> number & 1) for number in range(width)] + [False]
    table = ops.constant([float(flag) for flag in pinned], "float32")
    looked_up = ops.op(
        "Gather", table, ops.op("Where", is_prompt, ops.constant(width, "int32"), column)
    )
    return ops.op("Greater", looked_up, ops.constant(0.5, "float32"))


def _halves(
    ops: Operators,
    node: AttentionNode,
    rank: ir.Value,
    position: ir.Value,
    past_position: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """rank in the half that leads and in the other (R3, age_quota), PROTECTED elsewhere. Meant for
    full heads: of others the empty slots may count as tokens.
    """
    protected = ops.constant(PROTECTED, "float32")
    is_free = ops.op("Less", rank, protected)
    age = ops.op("Where", is_free, ops.cast(past_position, "float32"), protected)
    by_age, _ = ops.many("TopK", age, ops.constant([node.num_slots]), num_outputs=2, largest=0)
    num_free = ops.op("ReduceSum", ops.cast(is_free, "int32"), ops.constant([-1]), keepdims=1)
    is_odd = ops.op("Mod", position, ops.constant(2, "int32"))  # [B, 1, 1]
    num_older = ops.op(
        "Div",
        ops.op("Sub", ops.op("Add", num_free, ops.constant(1, "int32")), is_odd),
        ops.constant(2, "int32"),
    )
    boundary = ops.op("GatherElements", by_age, ops.cast(num_older, "int64"), axis=-1)
    older = ops.op("Less", age, boundary)
    leads = ops.op("Xor", older, ops.cast(is_odd, "bool"))
    return ops.op("Where", leads, rank, protected), ops.op("Where", leads, protected, rank)


def eviction_nodes(
    ops: Operators,
    node: AttentionNode,
    next_position: ir.Value,
    prompt_length: ir.Value,
    position: ir.Value,
    score: ir.Value | None,
) -> tuple[ir.Value, ir.Value | None]:
    """(position, score) after an eviction of evict_every slots in each head that has no empty one
    (R5, R7).

    Args: next_position int32 [B]: of the token about to be written; position int32, score float32
    [B, H, S].
    Returns: score only where score_decay changes it.
    """
    next_position, prompt_length = (
        ops.reshape(row, [-1, 1, 1]) for row in (next_position, prompt_length)
    )
    rank = _rank(ops, node.rule, score, position)
    rank = _protect(ops, node, rank, next_position, prompt_length, position)
    least = _least(ops, node, rank, next_position, position)
    empty = ops.constant(-1, "int32")
    evicted = ops.op(
        "ScatterElements", position, least, ops.op("Expand", empty, ops.op("Shape", least)), axis=-1
    )
    has_room = ops.op(
        "Less", ops.op("ReduceMin", position, ops.constant([-1])), ops.constant(0, "int32")
    )
    after = ops.op("Where", has_room, position, evicted)
    if score is None or node.score_decay == 1:
        return after, None
    factor = ops.op(
        "Where", has_room, ops.constant(1.0, "float32"), ops.constant(node.score_decay, "float32")
    )
    return after, ops.op("Mul", score, factor)


def _least(
    ops: Operators,
    node: AttentionNode,
    rank: ir.Value,
    next_position: ir.Value,
    position: ir.Value,
) -> ir.Value:
    """Slots that an eviction empties, int64 [B, H, evict_every]."""
    strata, count = [(rank, node.evict_every)], node.evict_every
    if node.rule.age_quota:
        leading, other = _halves(ops, node, rank, next_position, position)
        strata = [(leading, count - count // 2), (other, count // 2)]
    least = [
        ops.many("TopK", of_half, ops.constant([share]), num_outputs=2, largest=0)[1]
        for of_half, share in strata
        if share
    ]
    return least[0] if len(least) == 1 else ops.op("Concat", *least, axis=-1)
