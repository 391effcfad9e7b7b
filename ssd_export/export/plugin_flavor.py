"""The plugin flavor of a decode step: its attention left to the TensorRT plugin, a node a layer.
Needs onnx_ir, not torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ssd_export.export.functions import DOMAIN, OP_TYPE

OF_GROUPS = ("num_sinks", "num_recent", "by_score", "pinned_columns", "age_quota", "evict_every")
OF_LAYER = ("grid_width", "score_decay")
NUM_TOKEN_INPUTS = 5  # of a head group's node: query, key, value, position, prompt_length


@dataclass(frozen=True)
class NodeKind:
    """A kind of node of the plugin. inputs, outputs: before the caches of each group, past_key,
    past_value, past_position and, where it ranks by score, past_score, and the present_* in their
    memory.
    """

    op_type: str
    version: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


STEP = NodeKind(OP_TYPE, "4", ("heads", "position", "prompt_length"), ("out",))
WINDOW = NodeKind(
    "WindowAttention",
    "1",
    ("heads", "position", "prompt_length", "active"),
    ("out", "logits", "largest", "total"),
)
SETTLE = NodeKind(
    "WindowSettle",
    "1",
    ("heads", "position", "counts", "logits", "largest", "total"),
    (),
)
KINDS = (STEP, WINDOW, SETTLE)


def plugin_flavor(model: ir.Model) -> ir.Model:
    """The same decode step for the TensorRT plugin: no functions, and one node for the head groups
    of a layer, where the bundle has one for each.

    Inputs of the node: heads [B, H*G + 2 H, D], which are queries, keys and values of all groups,
    after RoPE; position, prompt_length int32 [B]; then the past_* of each group. Outputs: out [B,
    H*G, D], then the present_* of each group, in the memory of the past_*. Attributes: those of the
    groups' nodes, OF_GROUPS as lists.

    Before 10.7 a local function wins over a plugin of its name, since then the plugin wins. Before
    10.10 (JetPack 6.2 has 10.3) the parser looks for a plugin's namespace and version in attributes
    of these names alone, not in the node's domain.

    Raises: ValueError for a graph whose layers are not as the exporter writes them.
    """
    model = model.clone()
    model.functions.clear()
    layers: dict[ir.Node | None, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            query = node.inputs[0]
            split = None if query is None else query.producer()
            layers.setdefault(split, []).append(node)
    for split, nodes in layers.items():
        _join(model.graph, split, nodes)
    return model


def _join(graph: ir.Graph, split: ir.Node | None, nodes: Sequence[ir.Node]) -> None:
    """Puts one node in the place of a layer's, of the Split before and of the Concat after them."""
    attended = [node.outputs[0] for node in nodes]
    merge = _merging(attended)
    tokens = [node.inputs[place] for place in range(3) for node in nodes]
    if split is None or split.op_type != "Split" or list(split.outputs) != tokens:
        raise ValueError(f"{nodes[0].name}: queries, keys and values of a layer are not one Split")
    inputs = [split.inputs[0], *nodes[0].inputs[3:NUM_TOKEN_INPUTS]]
    inputs += [past for node in nodes for past in node.inputs[NUM_TOKEN_INPUTS:]]
    replaced = [attended[0] if merge is None else merge.outputs[0]]
    replaced += [present for node in nodes for present in node.outputs[1:]]
    outputs = [ir.Value(name=old.name, type=old.type, shape=old.shape) for old in replaced]
    joined = ir.Node(
        DOMAIN,
        OP_TYPE,
        inputs,
        node_attributes(STEP, [_numbers(node) for node in nodes]),
        outputs=outputs,
        name=f"{nodes[0].name}_layer",
    )
    graph.insert_before(nodes[0], joined)
    of_new = dict(zip(replaced, outputs, strict=True))
    graph.outputs[:] = [of_new.get(value, value) for value in graph.outputs]
    ir.convenience.replace_all_uses_with(replaced, outputs)
    graph.remove([*([] if merge is None else [merge]), *nodes, split], safe=True)


def _merging(attended: Sequence[ir.Value]) -> ir.Node | None:
    """The Concat of the groups' outputs; None where there is one group."""
    if len(attended) == 1:
        return None
    (merge,) = {node for value in attended for node in value.consumers()}
    if merge.op_type != "Concat" or list(merge.inputs) != list(attended):
        raise ValueError(f"{merge.name}: the outputs of a layer's head groups are not one Concat")
    return merge


def node_attributes(
    kind: NodeKind, of_groups: Sequence[Mapping[str, int | float]]
) -> list[ir.Attr]:
    """Attributes of a layer's node. of_groups: those of each group's; what is left out is 0."""
    lists = {name: [int(group.get(name, 0)) for group in of_groups] for name in OF_GROUPS}
    return [
        *(ir.AttrInt64s(name, values) for name, values in lists.items()),
        ir.AttrInt64("grid_width", int(of_groups[0]["grid_width"])),
        ir.AttrFloat32("score_decay", float(of_groups[0]["score_decay"])),
        ir.AttrString("plugin_namespace", DOMAIN),
        ir.AttrString("plugin_version", kind.version),
    ]


def _numbers(node: ir.Node) -> dict[str, int | float]:
    """Attributes of a group's node."""
    return {
        name: node.attributes[name].value
        for name in (*OF_GROUPS, *OF_LAYER)
        if name in node.attributes
    }
