"""Checks without generating: the graphs are those the policy promises, the heads are those the map
names, the weights are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from safetensors import safe_open

from ssd_export.bundle import Bundle
from ssd_export.config import ModelConfig
from ssd_export.dtypes import BY_ONNX
from ssd_export.errors import UserError
from ssd_export.export.weight_plan import plan_weights
from ssd_export.graph_spec import GraphSpec, TensorSpec
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.policy.allocation import allocate
from ssd_export.policy.costs import choices
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.presets import MAX_GROUPS, POLICIES, Heads
from ssd_export.policy.table import HeadGroup, PolicyTable
from ssd_export.verify.checks import Divergence, Rung
from ssd_export.verify.origin import different_twin, misnamed_policy


def check_contract(bundle: Bundle) -> Rung:
    """Rung `contract`: the graphs in the bundle take and give what its policy table promises, and
    every head is in the group that the head map says."""
    table, config, specs = bundle.config.policy, bundle.config.model, bundle.config.graphs
    figures: dict[str, Any] = {"graphs": sorted(specs), "head_map": "head_map.json" in bundle.files}
    for wanted in specs.values():
        difference = _difference(ir.load(bundle.file(f"onnx/{wanted.name}.onnx")).graph, wanted)
        if difference:
            return Rung("contract", figures, Divergence(f"onnx/{wanted.name}.onnx: {difference}"))
    misplaced = _misplaced_head(bundle, config, table)
    if misplaced is None:
        head_map = HeadMap.load(bundle.file("head_map.json")) if figures["head_map"] else None
        fault = misnamed_policy(table, config, head_map) or different_twin(bundle)
        misplaced = Divergence(fault) if fault else None
    return Rung("contract", figures, misplaced)


def _difference(graph: ir.Graph, spec: GraphSpec) -> str:
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        found = {value.name: _tensor_spec(value) for value in values}
        for tensor in tensors:
            if found.get(tensor.name) != tensor:
                return f"{tensor.name} is {found.get(tensor.name)}, promised is {tensor}"
    return ""


def _tensor_spec(value: ir.Value) -> TensorSpec:
    dtype = BY_ONNX[value.dtype].name if value.dtype in BY_ONNX else str(value.dtype)
    shape = tuple(d if isinstance(d, int) else d.value or "" for d in value.shape or ())
    return TensorSpec(value.name or "", dtype, shape)


def _misplaced_head(bundle: Bundle, config: ModelConfig, table: PolicyTable) -> Divergence | None:
    """The first head whose group is not its kind's, or a head map of another model."""
    if "head_map.json" not in bundle.files:
        return None
    try:
        head_map = HeadMap.load(bundle.file("head_map.json")).for_model(
            config, bundle.config.model_fingerprint
        )
    except UserError as error:
        return Divergence(f"head_map.json: {error}")
    if table.budget == 1:
        return None
    heads = POLICIES[table.name].heads if table.name in POLICIES else None
    if heads is Heads.ALLOCATED:
        return _misallocated_head(head_map, table)
    if heads is not Heads.BY_TYPE:
        return None
    kinds: dict[bool, HeadGroup] = {}
    for layer, semantic in enumerate(head_map.semantic()):
        for index, group, head in heads_of_layer(table, layer):
            kind = kinds.setdefault(semantic[head], group)
            if (kind.rule, kind.num_slots) != (group.rule, group.num_slots) or _is_semantic(
                group
            ) != semantic[head]:
                what = (
                    f"a {'semantic' if semantic[head] else 'spatial'} head by head_map.json has"
                    f" {group.num_slots} slots and {group.rule}"
                )
                return Divergence(what, layer=layer, group=index, head=head)
    return None


def _misallocated_head(head_map: HeadMap, table: PolicyTable) -> Divergence | None:
    """The first head with an option that is not on the head map's menu, or heads that cost more
    than allocated ones.

    Costs are compared, not heads: between options of equal cost another machine may choose
    otherwise.
    """
    if not head_map.cost_options:
        return Divergence("head_map.json has no costs, and the allocation stands on them")
    cost, lookahead = 0.0, table.lookahead
    options, costs = choices(head_map, lookahead)
    for layer in range(len(table.layers)):
        for index, group, head in heads_of_layer(table, layer):
            option = table.option(group)
            if option not in options:
                what = (
                    f"head_map.json has no option of {option.image_slots} image slots,"
                    f" {option.rule}"
                )
                return Divergence(
                    f"{what}, evict_every {option.evict_every}", layer=layer, group=index, head=head
                )
            cost += float(costs[layer, head, options.index(option)])
    used = max(map(len, table.layers))
    allocated = max(
        allocate(head_map, table.budget, groups, lookahead).cost
        for groups in range(used, MAX_GROUPS + 1)
    )
    if cost > allocated * 1.001:
        return Divergence(
            f"the heads' options cost {cost:.4g} by head_map.json, allocated ones {allocated:.4g}"
        )
    return None


def _is_semantic(group: HeadGroup) -> bool:
    return group.rule.by_score or group.rule.pinned_columns != 0


def heads_of_layer(table: PolicyTable, layer: int) -> list[tuple[int, HeadGroup, int]]:
    """(group index, group, KV head in the checkpoint) at each place of a layer."""
    places = [
        (index, group)
        for index, group in enumerate(table.layers[layer])
        for _ in range(group.num_heads)
    ]
    return [
        (index, group, head)
        for (index, group), head in zip(places, table.head_order[layer], strict=True)
    ]


def check_weights(
    bundle: Bundle,
    checkpoint: Checkpoint,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Rung:
    """Rung `weights`: every tensor of the bundle equals the checkpoint's, bit for bit, after
    permutation, rounding and quantization."""
    table = bundle.config.policy
    dtype, precision = getattr(torch, bundle.config.dtype), bundle.config.precision
    weights = plan_weights(checkpoint, table, dtype, precision.weights, precision.head)
    with safe_open(bundle.file("onnx/weights.safetensors"), framework="pt") as file:
        names = set(file.keys())
        for done, weight in enumerate(weights, start=1):
            if weight.name not in names:
                return Rung("weights", {}, Divergence(f"the bundle has no tensor {weight.name}"))
            found, wanted = file.get_tensor(weight.name), weight.make()
            if not torch.equal(found, wanted):
                return Rung(
                    "weights",
                    {"tensors": done},
                    _first_difference(weight.name, found, wanted, table, checkpoint.config),
                )
            progress("weights", done, len(weights))
    return Rung("weights", {"tensors": len(weights)})


def _first_difference(
    name: str, found: torch.Tensor, wanted: torch.Tensor, table: PolicyTable, config: ModelConfig
) -> Divergence:
    if found.shape != wanted.shape:
        return Divergence(
            f"{name} has shape {list(found.shape)}, the checkpoint's is {list(wanted.shape)}"
        )
    different = found != wanted
    place = tuple(different.nonzero()[0].tolist())
    error = (found.float() - wanted.float()).abs().max().item()
    what = (
        f"{int(different.sum())} of {different.numel()} weights of {name} differ from the"
        f" checkpoint, the first at {list(place)}"
    )
    layer = int(name.split(".")[1]) if name.startswith("layers.") else None
    return Divergence(
        what,
        layer=layer,
        head=_head_of(name, place, layer, table, config),
        error=error,
        allowed=0.0,
    )


def _head_of(
    name: str, place: tuple[int, ...], layer: int | None, table: PolicyTable, config: ModelConfig
) -> int | None:
    """The KV head in the checkpoint to which a weight of a q, k, v or o projection belongs."""
    if layer is None or not name.endswith((".qkv", ".o")):
        return None
    size, row = config.query_group_size, place[1] if name.endswith(".qkv") else place[0]
    head = row // config.head_dim  # of the queries, then of the keys, then of the values
    queries = config.num_heads
    at = head // size if head < queries else (head - queries) % config.num_kv_heads
    return table.head_order[layer][at]
