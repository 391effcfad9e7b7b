"""Checks what the files of a bundle say of themselves: which policy, which checkpoint, how to
sample.

Numbers that both runners read from the same file cannot differ between them, so a wrong one passes
every comparison of runners. Here they are compared with where they come from.
"""

from __future__ import annotations

import onnx_ir as ir

from ssd_export.bundle import Bundle
from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.export.exporter import generation_defaults
from ssd_export.model.checkpoint import Checkpoint
from ssd_export.model.families import family_of
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.make import make_policy
from ssd_export.policy.presets import POLICIES, Heads
from ssd_export.policy.table import PolicyTable
from ssd_export.verify.checks import Divergence, Rung

WITH_TOP_K = ("prefill", "decode_step")
RACE = "ArgMax"  # the node that ends the sampler; top-k stands before it


def check_origin(bundle: Bundle, checkpoint: Checkpoint) -> Rung:
    """Rung `origin`: tokenizer, shape and sampling defaults are the checkpoint's."""
    files = ("config.json", *family_of(checkpoint.config).prompt_files)
    for name in files:
        if bundle.file(name).read_bytes() != checkpoint.file(name).read_bytes():
            return Rung("origin", {}, Divergence(f"{name} is not the checkpoint's"))
    if bundle.config.model != checkpoint.config:
        return Rung("origin", {}, Divergence("ssd_config.json: model is not the checkpoint's"))
    wanted, found = generation_defaults(checkpoint), bundle.config.generation
    if found != wanted:
        what = f"ssd_config.json: generation is {found}, the checkpoint's is {wanted}"
        return Rung("origin", {}, Divergence(what))
    return Rung("origin", {"files": list(files)})


def misnamed_policy(table: PolicyTable, config: ModelConfig, head_map: HeadMap | None) -> str:
    """Difference between the table and what its name stands for, "" where there is none.

    What a user can set (window, evict_every, num_recent, num_sinks) may be anything. Where the
    table is, number for number, another policy's usual one and not its own, the name is wrong.
    """
    row = POLICIES.get(table.name)
    if row is None:
        return f"policy {table.name} is none of {', '.join(POLICIES)}"
    everything = table.prompt_slots + table.grid.num_tokens
    if all(group.num_slots >= everything for layer in table.layers for group in layer):
        return ""  # any policy's table at budget 1; rung `compression` says where it is not
    if row.heads is Heads.EVERYTHING:
        return f"policy {table.name} keeps everything, and the budget is {table.budget:g}"
    if table.score_decay != row.score_decay:
        return f"policy {table.name} has score_decay {row.score_decay:g}, not {table.score_decay:g}"
    if row.heads is Heads.ALIKE:
        kinds = {group.rule.by_score for layer in table.layers for group in layer}
        if kinds != {row.by_score}:
            return (
                f"policy {table.name} ranks heads {'by score' if row.by_score else 'by position'}"
            )
    usual = _usual_tables(table, config, head_map)
    if usual and table.name not in usual:
        return f"the table is that of {' or '.join(usual)}, not of {table.name}"
    return ""


def _usual_tables(table: PolicyTable, config: ModelConfig, head_map: HeadMap | None) -> list[str]:
    """The policies whose table, with nothing set by a user, is this one."""
    names = []
    for row in POLICIES.values():
        if row.heads is Heads.ALLOCATED or (row.needs_head_map and head_map is None):
            continue
        try:
            usual = make_policy(
                row.name,
                config,
                budget=table.budget,
                prompt_slots=table.prompt_slots,
                head_map=head_map if row.needs_head_map else None,
                lookahead=table.lookahead,
            )
        except UserError:  # a budget too small for that policy
            continue
        if usual.layers == table.layers and usual.score_decay == table.score_decay:
            names.append(row.name)
    return names


def different_twin(bundle: Bundle) -> str:
    """Difference between a graph with top-k and the one without, apart from its sampler; "" where
    there is none. Generation without --top-k never runs it, so no comparison of images sees it.
    """
    for name in WITH_TOP_K:
        plain, twin = (
            ir.load(bundle.file(f"onnx/{graph}.onnx")) for graph in (name, f"{name}_top_k")
        )
        nodes, others = _nodes(plain.graph), _nodes(twin.graph)
        end = max(i for i, node in enumerate(nodes) if node[1] == RACE)
        first = next((i for i in range(end) if i >= len(others) or nodes[i] != others[i]), None)
        functions = [{f: _nodes(g) for f, g in m.functions.items()} for m in (plain, twin)]
        if first is not None or functions[0] != functions[1]:
            where = f"node {nodes[first][2]}" if first is not None else "its functions"
            return f"onnx/{name}_top_k.onnx computes something else than {name} ({where})"
    return ""


def _nodes(graph: ir.Graph | ir.Function) -> list[tuple[str, ...]]:
    """Every node as text: domain, operator, name, inputs, outputs, attributes."""
    return [
        (
            node.domain,
            node.op_type,
            node.name or "",
            *(value.name or "" if value else "" for value in node.inputs),
            "->",
            *(value.name or "" for value in node.outputs),
            *(f"{name}={_text(value)}" for name, value in sorted(node.attributes.items())),
        )
        for node in graph
    ]


def _text(attribute: ir.Attr) -> str:
    value = attribute.value
    return repr(value.numpy().tolist()) if isinstance(value, ir.TensorProtocol) else str(value)
