"""The plugin flavor of a pass over several tokens: two nodes a layer over the same inputs and
outputs, and the tokens and slots of the bundle's graph, run on passes of a whole generation with
the torch reference in the place of the nodes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ssd_export.bundle import Bundle, open_bundle
from ssd_export.cache.state import GroupState
from ssd_export.cache.window_attention import attend_layer_window
from ssd_export.export.functions import DOMAIN
from ssd_export.export.plugin_flavor import OF_GROUPS, OF_LAYER, SETTLE, WINDOW
from ssd_export.export.plugin_window import window_flavor
from ssd_export.graph_spec import CacheTensor
from ssd_export.policy.table import GroupPolicy
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import PromptBatch
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import PROMPTS, bundle, checkpoint, head_map_file
from tests.runtime.test_lookahead import random_bundle

WIDTH = 6


def made_bundle(**model: int) -> Bundle:
    whole = checkpoint(TinyJanus(seed=3, **model))
    return open_bundle(bundle(whole, "ssd-row", head_map=str(head_map_file(whole)), evict_every=8))


@pytest.fixture(scope="module")
def made() -> Bundle:
    return made_bundle(num_kv_heads=2)


@pytest.fixture(scope="module")
def models(made: Bundle) -> tuple[ir.Model, ir.Model]:
    """The bundle's decode_window and its plugin flavor."""
    window = ir.load(made.file("onnx/decode_window.onnx"))
    return window, window_flavor(window, made.config)


def names(values: list[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


def caches_of(bundle: Bundle, layer: int) -> list[CacheTensor]:
    return [
        CacheTensor(layer, place, part)
        for place, group in enumerate(bundle.config.policy.layers[layer])
        for part in ("key", "value", "position", "score")
        if part != "score" or group.rule.by_score
    ]


def test_a_layer_has_two_nodes_which_hand_on_its_caches(made: Bundle, models: tuple) -> None:
    layers = range(len(made.config.policy.layers))
    nodes = [node for node in models[1].graph if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [
        kind.op_type for kind in (WINDOW, SETTLE) for _ in layers
    ]
    for layer in layers:
        attends, settles = nodes[layer], nodes[len(layers) + layer]
        caches = caches_of(made, layer)
        first, last = len(WINDOW.inputs), len(SETTLE.inputs)
        assert names(attends.inputs[first:]) == [cache.past for cache in caches]
        assert settles.inputs[last:] == attends.outputs[len(WINDOW.outputs) :]
        assert names(settles.outputs) == [cache.present for cache in caches]
        assert attends.inputs[:2] == settles.inputs[:2]
        assert settles.inputs[3:last] == attends.outputs[1 : len(WINDOW.outputs)]
        for node, kind in ((attends, WINDOW), (settles, SETTLE)):
            given = {name: node.attributes[name].value for name in (*OF_GROUPS, *OF_LAYER)}
            groups = made.config.policy.layers[layer]
            assert given["num_recent"] == tuple(group.rule.num_recent for group in groups)
            assert given["evict_every"] == tuple(group.evict_every for group in groups)
            assert node.attributes["plugin_version"].value == kind.version


def test_nothing_of_the_operators_is_left_and_the_contract_stays(models: tuple) -> None:
    window, plugin = models
    assert names(plugin.graph.inputs) == names(window.graph.inputs)
    assert names(plugin.graph.outputs) == names(window.graph.outputs)
    for ours, theirs in zip(plugin.graph.outputs, window.graph.outputs, strict=True):
        assert (ours.type, ours.shape) == (theirs.type, theirs.shape)
    kinds = [node.op_type for node in plugin.graph]
    assert not {"Softmax", "ScatterND", "TopK"} & {*kinds}
    assert [node.op_type for node in window.graph].count("ScatterND") > 0
    weights = {name for name, value in window.graph.initializers.items() if value.shape != ()}
    assert {*plugin.graph.initializers} == weights


def test_a_graph_that_the_exporter_did_not_write_is_refused(made: Bundle, models: tuple) -> None:
    changed = models[0].clone()
    written = next(node for node in changed.graph if node.op_type == "ScatterND")
    written.replace_input_with(2, written.inputs[1])
    with pytest.raises(ValueError, match=r"layer 0: .*|values of layer 0"):
        window_flavor(changed, made.config)


class Layers:
    """The two nodes as operators that onnx's evaluator runs: layers attend in their order, then
    settle in it.
    """

    def __init__(self, bundle: Bundle) -> None:
        table = bundle.config.policy
        self.layers = [
            [GroupPolicy(group, table.score_decay, table.grid.width) for group in groups]
            for groups in table.layers
        ]
        self.begun = 0
        self.waiting: list[tuple[list[np.ndarray], list[GroupState], Callable[..., None]]] = []

    def operators(self) -> list[type[OpRun]]:
        layers = self

        class WindowAttention(OpRun):
            op_domain = DOMAIN

            def _run(self, *given: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
                return layers.attend(*given)

        class WindowSettle(OpRun):
            op_domain = DOMAIN

            def _run(self, *given: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
                return layers.settle(*given)

        return [WindowAttention, WindowSettle]

    def attend(
        self,
        heads: np.ndarray,
        position: np.ndarray,
        prompt_length: np.ndarray,
        active: np.ndarray,
        *caches: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        policies = self.layers[self.begun % len(self.layers)]
        self.begun += 1
        left, states = [torch.from_numpy(cache.copy()) for cache in caches], []
        for policy in policies:
            parts = [left.pop(0) for _ in range(3 + policy.group.rule.by_score)]
            states.append(GroupState(*parts, *[None] * (4 - len(parts))))
        num_heads = sum(policy.group.num_heads for policy in policies)
        rows, all_heads, places, _ = heads.shape
        parts = torch.from_numpy(heads).split([all_heads - 2 * num_heads, num_heads, num_heads], 1)
        numbers = [torch.from_numpy(one) for one in (prompt_length, position)]
        out, write = attend_layer_window(
            *parts, states, policies, *numbers, torch.from_numpy(active) != 0
        )
        kept = np.full((rows, out.shape[1], places, 1), self.begun, np.float32)
        own = [kept, kept[..., 0], -kept[..., 0]]
        given = [heads, position, *own, *self.arrays(states)]
        self.waiting.append((given, states, write))
        return out.numpy(), *own, *self.arrays(states)

    def settle(
        self, heads: np.ndarray, position: np.ndarray, counts: np.ndarray, *rest: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        wanted, states, write = self.waiting.pop(0)
        for ours, theirs in zip([heads, position, *rest], wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert counts.dtype == np.int32
        write(torch.from_numpy(counts))
        return tuple(self.arrays(states))

    @staticmethod
    def arrays(states: list[GroupState]) -> list[np.ndarray]:
        parts = (part for one in states for part in (one.key, one.value, one.position, one.score))
        return [part.numpy().copy() for part in parts if part is not None]


def passes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> Iterator[tuple]:
    """(inputs, outputs) of every pass of a generation by ONNX Runtime."""
    with ImageGenerator.from_bundle(bundle.path, num_threads=1) as generator:
        runner, found, batches = generator.runner, [], []
        spec = bundle.config.graphs["decode_window"]
        prefill, window = runner.prefill, runner.decode_window

        def filled(batch: PromptBatch) -> None:
            batches.append(batch)
            prefill(batch)

        def watched(first: np.ndarray, limit: np.ndarray, tokens: np.ndarray, noise: Any) -> Any:
            sampling = batches[-1].sampling_inputs()
            sampling.pop("top_k")
            given = {
                "window_tokens": tokens.copy(),
                "first": first.copy(),
                "limit": limit.copy(),
                "prompt_length": batches[-1].lengths,
                "noise": noise().copy(),
                **sampling,
            }
            given |= {cache.past: runner.read_cache(cache).copy() for cache in spec.cache_inputs}
            sampled, kept = window(first, limit, tokens, noise)
            made = {"sampled": sampled.copy(), "kept": kept.copy()}
            made |= {cache.present: runner.read_cache(cache).copy() for cache in spec.cache_inputs}
            found.append((given, made))
            return sampled, kept

        monkeypatch.setattr(runner, "prefill", filled)
        monkeypatch.setattr(runner, "decode_window", watched)
        generator(PROMPTS[:2], num_images=1, lookahead=WIDTH, **asked)
    yield from found


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["ssd-row", "random"])
def test_every_pass_has_the_tokens_and_slots_of_the_bundle_s_graph(
    rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made_bundle().path if rules == "ssd-row" else random_bundle(1, monkeypatch)
    own = open_bundle(Path(shutil.copytree(whole, tmp_path / "bundle")))
    path = own.file("onnx/decode_window.onnx").with_name("plugin.onnx")
    ir.save(window_flavor(ir.load(own.file("onnx/decode_window.onnx")), own.config), path)
    layers = Layers(own)
    evaluator = ReferenceEvaluator(onnx.load(path), new_ops=layers.operators())
    taken = list(passes(own, monkeypatch, seed=1, temperature=0.3))
    evicting = [
        number
        for number, (given, made) in enumerate(taken)
        if any(
            (made[n.replace("past_key_values", "present")] < values).any()
            for n, values in given.items()
            if n.endswith("position")
        )
    ]
    assert evicting, "a pass in which heads evict"
    for number in sorted({0, 1, *evicting[:4], len(taken) - 1}):
        given, wanted = taken[number]
        outputs = dict(zip(evaluator.output_names, evaluator.run(None, given), strict=True))
        for name, values in wanted.items():
            if name.endswith("score"):
                held = wanted[name.replace("score", "position")] >= 0
                np.testing.assert_allclose(outputs[name][held], values[held], atol=1e-5)
            elif name.endswith(("key", "value")):
                held = wanted[f"{name.rpartition('.')[0]}.position"] >= 0
                np.testing.assert_allclose(outputs[name][held], values[held], atol=1e-4)
            else:
                np.testing.assert_array_equal(outputs[name], values, err_msg=name)
    assert not layers.waiting
