"""The plugin flavor of a pass over several tokens: two nodes of the plugin in the place of each
layer's operators (window_attention.py), since which tokens count is known after the last layer.
Needs onnx_ir, not torch.

Inputs and outputs of the graph stay. WindowAttention takes the heads of a layer before their Split
and gives the value after their Concat; WindowSettle takes its caches over, and gives the present_*.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ssd_export.bundle import BundleConfig
from ssd_export.export.functions import DOMAIN, AttentionNode
from ssd_export.export.operators import Operators
from ssd_export.export.plugin_flavor import SETTLE, WINDOW, NodeKind, node_attributes
from ssd_export.graph_spec import CacheTensor

GROUP_AXIS = 1  # of heads, in a window


def window_flavor(model: ir.Model, config: BundleConfig) -> ir.Model:
    """A decode_window of the bundle for the TensorRT plugin. Changes nothing of model.

    Raises: ValueError for a graph whose layers are not as the exporter writes them.
    """
    model = model.clone()
    graph = model.graph
    of_rows = _of_rows(graph, config)
    settled: list[ir.Node] = []
    for layer in range(len(config.policy.layers)):
        attention, settle = _layer_nodes(graph, config, layer, of_rows)
        (merged,) = _merged(graph, config, layer)
        graph.insert_before(_split(graph, layer), attention)
        ir.convenience.replace_all_uses_with(merged, attention.outputs[0])
        settled.append(settle)
    graph.extend(settled)
    presents = {value.name: value for node in settled for value in node.outputs}
    graph.outputs[:] = [presents.get(value.name, value) for value in graph.outputs]
    model.opset_imports[DOMAIN] = 1
    return RemoveUnusedNodesPass()(model).model


def _of_rows(graph: ir.Graph, config: BundleConfig) -> dict[str, ir.Value]:
    """Inputs of the nodes that have a number for each row, int32 [B]: position, prompt_length,
    active, counts.
    """
    inputs = {value.name: value for value in graph.inputs}
    (kept,) = (value for value in graph.outputs if value.name == "kept")
    before, after = Operators(), Operators()

    def of_rows(ops: Operators, of_images: ir.Value) -> ir.Value:
        copies = [ops.cast(of_images, "int32")] * config.model.rows_per_image
        return ops.op("Concat", *copies, axis=0) if len(copies) > 1 else copies[0]

    one = before.constant([1])
    step = of_rows(before, before.op("Sub", inputs["first"], one))
    found = {
        "position": before.op("Add", inputs["prompt_length"], step),
        "prompt_length": inputs["prompt_length"],
        "active": of_rows(before, before.op("Min", inputs["limit"], one)),
        "counts": of_rows(after, kept),
    }
    graph.insert_before(graph[0], before.tape.nodes)
    graph.extend(after.tape.nodes)
    return found


def _layer_nodes(
    graph: ir.Graph, config: BundleConfig, layer: int, of_rows: dict[str, ir.Value]
) -> tuple[ir.Node, ir.Node]:
    """Both nodes of a layer."""
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    caches = [
        cache for cache in config.graphs["decode_window"].cache_inputs if cache.layer == layer
    ]
    past = [inputs[cache.past] for cache in caches]
    heads = _split(graph, layer).inputs[0]
    assert heads is not None  # an input that Split must have
    given = of_rows | {"heads": heads}
    between = [_like(value, f"{value.name}.attended") for value in past]
    own = {name: ir.Value(name=f"{WINDOW.op_type}.{layer}.{name}") for name in WINDOW.outputs}
    (own["out"],) = (_like(value, value.name) for value in _merged(graph, config, layer))
    attention = _node(config, layer, WINDOW, given, past, [*own.values(), *between])
    presents = [_like(outputs[cache.present], cache.present) for cache in caches]
    settle = _node(config, layer, SETTLE, given | own, between, presents)
    return attention, settle


def _node(
    config: BundleConfig,
    layer: int,
    kind: NodeKind,
    given: dict[str, ir.Value],
    caches: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> ir.Node:
    nodes = [
        AttentionNode.of(
            group,
            config.policy,
            config.model.query_group_size,
            config.model.head_dim,
            config.dtype,
        )
        for group in config.policy.layers[layer]
    ]
    return ir.Node(
        DOMAIN,
        kind.op_type,
        [*(given[name] for name in kind.inputs), *caches],
        node_attributes(kind, [node.attributes() for node in nodes]),
        outputs=outputs,
        name=f"{kind.op_type}.{layer}",
    )


def _like(value: ir.Value, name: str | None) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)


def _written(graph: ir.Graph, layer: int, group: int, part: str) -> ir.Node:
    """What writes a window's rows into a cache."""
    name = CacheTensor(layer, group, part).past
    (past,) = (value for value in graph.inputs if value.name == name)
    return _only((node for node in past.consumers() if node.op_type == "ScatterND"), name)


def _split(graph: ir.Graph, layer: int) -> ir.Node:
    """What splits the heads of a layer into queries, keys and values of its groups."""
    rows = _written(graph, layer, 0, "key").inputs[2]
    split = None if rows is None else rows.producer()
    if split is None or split.op_type != "Split":
        raise ValueError(f"layer {layer}: queries, keys and values of a window are not one Split")
    return split


def _merged(graph: ir.Graph, config: BundleConfig, layer: int) -> list[ir.Value]:
    """The outputs of all heads of a layer [B, H*G, W, D], in a list of one."""
    groups = range(len(config.policy.layers[layer]))
    attended = [_attended(graph, config, layer, group) for group in groups]
    if len(attended) == 1:
        return attended
    merge = _only({node for value in attended for node in value.consumers()}, f"layer {layer}")
    if merge.op_type != "Concat" or list(merge.inputs) != attended:
        raise ValueError(f"layer {layer}: the outputs of its head groups are not one Concat")
    return list(merge.outputs)


def _attended(graph: ir.Graph, config: BundleConfig, layer: int, group: int) -> ir.Value:
    """The outputs of a group's heads: of the product with its values."""
    values = _written(graph, layer, group, "value").outputs[0]
    product = _only((node for node in values.consumers()), f"values of layer {layer}")
    if config.model.query_group_size == 1:
        return product.outputs[0]
    return _only(product.outputs[0].consumers(), f"outputs of layer {layer}").outputs[0]


def _only(nodes: Iterable[ir.Node], what: str) -> ir.Node:
    found = list(nodes)
    if len(found) != 1:
        raise ValueError(f"{what}: used by {len(found)} nodes where the exporter writes one")
    return found[0]
