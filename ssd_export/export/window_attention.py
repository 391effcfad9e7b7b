"""Attention of a window of steps over a head group's slots, in ordinary operators: R7 for several
tokens of each row in one pass.

The window's keys and values are written before it is known which of its tokens count, into the
slots that single steps would take (R6). Queries see slots by position, so a query never sees a
later token; afterwards the positions of the tokens that do not count are emptied again, and only
queries that count add to the scores (R2). The reference is cache/window_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ssd_export.export.functions import PROTECTED, AttentionNode, eviction_nodes, quantize_rows
from ssd_export.export.operators import Operators
from ssd_export.policy.table import GREATEST_CODE


@dataclass(frozen=True, kw_only=True)
class Places:
    """Places of a pass in every row.

    position: int32 [B, 1, W, 1], of each place's token; prompt_length: int32 [B]; steps: int64 [W],
    one for each place.
    """

    position: ir.Value
    prompt_length: ir.Value
    steps: ir.Value
    _heads: dict[int, ir.Value] = field(default_factory=dict)

    def heads(self, ops: Operators, num_heads: int) -> ir.Value:
        """int64 [B, H, W, 2]: row and head of every place, made once for all layers."""
        if num_heads not in self._heads:
            rows, width = ops.op("Shape", self.prompt_length), ops.op("Shape", self.steps)
            zero, one = ops.constant(0), ops.constant(1)
            row = ops.reshape(ops.op("Range", zero, ops.op("Squeeze", rows), one), [-1, 1, 1, 1])
            pairs = ops.constant([[[[0, head]] for head in range(num_heads)]])  # [1, H, 1, 2]
            pairs = ops.op("Add", ops.op("Mul", row, ops.constant([1, 0])), pairs)
            shape = ops.op(
                "Concat", rows, ops.constant([num_heads]), width, ops.constant([2]), axis=0
            )
            self._heads[num_heads] = ops.op("Expand", pairs, shape)
        return self._heads[num_heads]


@dataclass(frozen=True, kw_only=True)
class WindowPlaces(Places):
    """Places that follow one another, of each row's own. newest: int32 [B, 1, 1], position of the
    token written last; rests: bool [B, 1, 1]; steps: 0, 1, ...
    """

    newest: ir.Value
    rests: ir.Value


@dataclass(frozen=True)
class AttendedGroup:
    """A group whose window waits to be settled.

    present: what is written already: key, value and their scales; past_position: int32 [B, H, S];
    tentative: int32, [B, H, S], or
    [S] where slot and position are one; is_new: bool, alike, the slots that were empty; score:
    float32 [B, H, S] before the window; probs: float32 [B, H, G W, S].
    """

    node: AttentionNode
    present: dict[str, ir.Value]
    past_position: ir.Value
    tentative: ir.Value
    is_new: ir.Value
    score: ir.Value | None
    probs: ir.Value


def attend_window(
    ops: Operators,
    node: AttentionNode,
    places: WindowPlaces,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    past: dict[str, ir.Value],
) -> tuple[ir.Value, AttendedGroup]:
    """(out [B, H G, W, D], the group to settle). query [B, H G, W, D], key, value [B, H, W, D],
    after RoPE.
    """
    position, score = _evicted(ops, node, places, past)
    tentative, is_new = _tentative(ops, node, places, position)
    of_slot = ops.op("Unsqueeze", tentative, ops.constant([2])) if node.evicts else tentative
    index = _index(ops, node, places, of_slot)
    present = _written(ops, node, index, {"key": key, "value": value}, past)
    later = ops.op("Greater", of_slot, places.position)  # [B, H, W, S]
    probs = _probabilities(ops, node, query, present, later)
    out = _weighted_values(ops, node, probs, present)
    before = past["position"]
    return out, AttendedGroup(node, present, before, tentative, is_new, score, probs)


def attend_rows(
    ops: Operators,
    node: AttentionNode,
    places: Places,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    past: dict[str, ir.Value],
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """(out [B, H G, W, D], present of every part) of places in several grid rows, where slot and
    position are one. The slot of a token that is to come is empty, and no place sees it.
    """
    index = _index(ops, node, places, places.position)
    position = ops.op("Squeeze", places.position, ops.constant([3]))  # [B, 1, W]
    position = ops.op("Expand", position, ops.constant([1, node.num_heads, 1]))
    new = {"key": key, "value": value, "position": position}
    present = _written(ops, node, index, new, past)
    slots = ops.constant(list(range(node.num_slots)), "int32")
    later = ops.op("Greater", slots, places.position)  # [B, 1, W, S]
    empty = ops.op("Less", present["position"], ops.constant(0, "int32"))
    hidden = ops.op("Or", later, ops.op("Unsqueeze", empty, ops.constant([2])))  # [B, H, W, S]
    probs = _probabilities(ops, node, query, present, hidden)
    return _weighted_values(ops, node, probs, present), present


def _written(
    ops: Operators,
    node: AttentionNode,
    index: ir.Value,
    new: dict[str, ir.Value],
    past: dict[str, ir.Value],
) -> dict[str, ir.Value]:
    """The parts with new rows at their places, quantized where the cache is."""
    new = dict(new)
    for part in ("key", "value"):
        if node.kv_dtype == "int8":
            new[part], new[f"{part}_scale"] = quantize_rows(ops, new[part], node.dtype)
        elif node.kv_dtype != "model":
            new[part] = ops.cast(new[part], node.kv_dtype)
    return {part: ops.op("ScatterND", past[part], index, rows) for part, rows in new.items()}


def settle_window(
    ops: Operators, group: AttendedGroup, places: WindowPlaces, last: ir.Value, counts: ir.Value
) -> dict[str, ir.Value]:
    """The present of every part, as single steps would leave it.

    Args: last: int32 [B, 1, 1], position of the last token that counts; counts: float32 [B, W], 1
    for the queries that count, else 0.
    """
    node, tentative = group.node, group.tentative
    if node.evicts:
        is_left = ops.op("Greater", tentative, last)
        position = ops.op("Where", is_left, ops.constant(-1, "int32"), tentative)
    else:  # what was there before stays as it is
        is_kept = ops.op("And", group.is_new, ops.op("LessOrEqual", tentative, last))  # [B, 1, S]
        position = ops.op("Where", is_kept, tentative, group.past_position)
    present = group.present | {"position": position}
    if group.score is None:
        return present
    mask = ops.op("Concat", *[counts] * node.query_group_size, axis=-1)
    received = ops.op("MatMul", ops.op("Unsqueeze", mask, ops.constant([1, 2])), group.probs)
    before = ops.op("Where", group.is_new, ops.constant(0.0, "float32"), group.score)
    received = ops.reshape(received, [0, node.num_heads, node.num_slots])
    return present | {"score": ops.op("Add", before, received)}


def _evicted(
    ops: Operators, node: AttentionNode, places: WindowPlaces, past: dict[str, ir.Value]
) -> tuple[ir.Value, ir.Value | None]:
    """Positions and scores before the window. Groups that evict one token do it in the step (R7),
    others before it, by the evict graph.
    """
    position, score = past["position"], past.get("score")
    if not node.evicts or node.evict_every > 1:
        return position, score
    next_position = ops.op("Add", ops.op("Squeeze", places.newest, ops.constant([1, 2])), _one(ops))
    evicted, scaled = eviction_nodes(
        ops, node, next_position, places.prompt_length, position, score
    )
    if scaled is not None and score is not None:
        score = ops.op("Where", places.rests, score, scaled)
    return ops.op("Where", places.rests, position, evicted), score


def _one(ops: Operators) -> ir.Value:
    return ops.constant(1, "int32")


def _tentative(
    ops: Operators, node: AttentionNode, places: WindowPlaces, position: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Positions as if every empty slot were taken, in R6's order, by the tokens to come; and bool,
    the slots that are empty.
    """
    if not node.evicts:  # slot and position are one
        slots = ops.constant(list(range(node.num_slots)), "int32")
        return slots, ops.op("Greater", slots, places.newest)
    empty = ops.op("Less", position, ops.constant(0, "int32"))
    order = ops.op("CumSum", ops.cast(empty, "int32"), ops.constant(2))
    return ops.op("Where", empty, ops.op("Add", places.newest, order), position), empty


def _index(ops: Operators, node: AttentionNode, places: Places, of_slot: ir.Value) -> ir.Value:
    """int64 [B, H, W, 3]: row, head and slot of each place's token."""
    heads = places.heads(ops, node.num_heads)
    if node.evicts:
        found = ops.cast(ops.op("Equal", of_slot, places.position), "int32")
        slot = ops.op("ArgMax", found, axis=-1)
    else:  # slot and position are one
        slot = ops.op(
            "Expand", ops.cast(places.position, "int64"), ops.constant([1, node.num_heads, 1, 1])
        )
    return ops.op("Concat", heads, slot, axis=-1)


def _probabilities(
    ops: Operators,
    node: AttentionNode,
    query: ir.Value,
    present: dict[str, ir.Value],
    later: ir.Value,
) -> ir.Value:
    """float32 [B, H, G W, S]."""
    group, is_int8 = node.query_group_size, node.kv_dtype == "int8"
    factor = node.head_dim**-0.5 / (GREATEST_CODE if is_int8 else 1)
    if group > 1:
        query = ops.reshape(query, [0, node.num_heads, -1, node.head_dim])
    scaled = ops.op("Mul", query, ops.constant(factor, node.dtype))
    key = _computed(ops, node, present["key"])
    logits = ops.op("MatMul", scaled, ops.op("Transpose", key, perm=[0, 1, 3, 2]))
    if node.dtype != "float32":
        logits = ops.cast(logits, "float32")
    if is_int8:
        logits = ops.op("Mul", logits, ops.reshape(present["key_scale"], [0, 0, 1, node.num_slots]))
    if group > 1:
        logits = ops.reshape(logits, [0, node.num_heads, group, -1, node.num_slots])
        later = ops.op("Unsqueeze", later, ops.constant([2]))
    masked = ops.op("Where", later, ops.constant(-PROTECTED, "float32"), logits)
    probs = ops.op("Softmax", masked, axis=-1)
    if group > 1:
        probs = ops.reshape(probs, [0, node.num_heads, -1, node.num_slots])
    return probs


def _computed(ops: Operators, node: AttentionNode, rows: ir.Value) -> ir.Value:
    """Keys or values in the dtype of what is computed, codes without their scales."""
    return rows if node.kv_dtype == "model" else ops.cast(rows, node.dtype)


def _weighted_values(
    ops: Operators, node: AttentionNode, probs: ir.Value, present: dict[str, ir.Value]
) -> ir.Value:
    """[B, H G, W, D]."""
    value, is_int8 = _computed(ops, node, present["value"]), node.kv_dtype == "int8"
    if is_int8:
        scale = ops.reshape(present["value_scale"], [0, 0, 1, node.num_slots])
        probs = ops.op("Mul", probs, scale)
    weights = probs if node.dtype == "float32" else ops.cast(probs, node.dtype)
    out = ops.op("MatMul", weights, value)  # [B, H, G W, D]
    if is_int8:
        out = ops.op("Mul", out, ops.constant(1 / GREATEST_CODE, node.dtype))
    if node.query_group_size > 1:
        out = ops.reshape(out, [0, node.num_heads * node.query_group_size, -1, node.head_dim])
    return out
