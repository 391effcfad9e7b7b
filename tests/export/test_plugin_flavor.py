"""The plugin flavor of a decode step: one node a layer, over the same inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.export.functions import DOMAIN, OP_TYPE
from ssd_export.export.plugin_flavor import OF_GROUPS, OF_LAYER, plugin_flavor
from ssd_export.graph_spec import CacheTensor
from ssd_export.policy.table import pinned_bits
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint, head_map_file

TINY = TinyJanus(seed=3, num_kv_heads=2)


@pytest.fixture(scope="module")
def made() -> Bundle:
    model = checkpoint(TINY)
    return open_bundle(Path(bundle(model, "ssd-row", head_map=str(head_map_file(model)))))


@pytest.fixture(scope="module")
def models(made: Bundle) -> tuple[ir.Model, ir.Model]:
    """The bundle's decode step and its plugin flavor."""
    step = ir.load(made.file("onnx/decode_step.onnx"))
    return step, plugin_flavor(step)


def names(values: list[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


def test_a_layer_has_one_node_with_all_its_caches(made: Bundle, models: tuple) -> None:
    layers = made.config.policy.layers
    nodes = [node for node in models[1].graph if node.domain == DOMAIN]
    assert len(nodes) == len(layers) and max(map(len, layers)) > 1
    for layer, (node, groups) in enumerate(zip(nodes, layers, strict=True)):
        caches = [
            CacheTensor(layer, place, part)
            for place, group in enumerate(groups)
            for part in ("key", "value", "position", "score")
            if part != "score" or group.rule.by_score
        ]
        assert node.op_type == OP_TYPE
        assert names(node.inputs[3:]) == [cache.past for cache in caches]
        assert names(node.outputs[1:]) == [cache.present for cache in caches]
        given = {name: node.attributes[name].value for name in (*OF_GROUPS, *OF_LAYER)}
        assert given == {
            "num_sinks": tuple(group.rule.num_sinks for group in groups),
            "num_recent": tuple(group.rule.num_recent for group in groups),
            "by_score": tuple(int(group.rule.by_score) for group in groups),
            "pinned_columns": tuple(pinned_bits(group.rule.pinned_columns) for group in groups),
            "age_quota": tuple(int(group.rule.age_quota) for group in groups),
            "evict_every": tuple(group.evict_every for group in groups),
            "grid_width": made.config.policy.grid.width,
            "score_decay": made.config.policy.score_decay,
        }


def test_the_heads_of_all_groups_are_one_input(models: tuple) -> None:
    """Neither split before the node nor put together after it."""
    step, plugin = models
    nodes = [node for node in plugin.graph if node.domain == DOMAIN]
    attending = [node for node in step.graph if node.domain == DOMAIN]
    splits = dict.fromkeys(node.inputs[0].producer() for node in attending)
    assert names(node.inputs[0] for node in nodes) == names(split.inputs[0] for split in splits)
    assert all(node.inputs[0].producer().op_type == "Reshape" for node in nodes)
    assert all(use.op_type == "Reshape" for node in nodes for use in node.outputs[0].consumers())
    kinds = [node.op_type for node in plugin.graph]
    assert kinds.count("Split") == [node.op_type for node in step.graph].count("Split") - len(nodes)


def test_inputs_and_outputs_stay_and_the_bundle_s_graph_is_untouched(models: tuple) -> None:
    step, plugin = models
    assert names(plugin.graph.inputs) == names(step.graph.inputs)
    assert names(plugin.graph.outputs) == names(step.graph.outputs)
    assert step.functions and not plugin.functions
    for ours, theirs in zip(plugin.graph.outputs, step.graph.outputs, strict=True):
        assert (ours.type, ours.shape) == (theirs.type, theirs.shape)


def test_a_graph_that_the_exporter_did_not_write_is_refused(models: tuple) -> None:
    changed = models[0].clone()
    node = next(node for node in changed.graph if node.domain == DOMAIN)
    node.replace_input_with(1, node.inputs[2])
    with pytest.raises(ValueError, match="queries, keys and values of a layer are not one Split"):
        plugin_flavor(changed)
