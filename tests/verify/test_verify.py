"""A right bundle is verified; every planted fault is found at its rung, with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors import safe_open

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from ssd_export.export import exporter
from ssd_export.export.exporter import export_bundle
from ssd_export.export.temporary_bundle import PolicyChoice
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.table import HeadGroup, PolicyTable
from ssd_export.policy.usual import EACH_FOR_ITSELF
from ssd_export.runtime import loop
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.verify import generation as ladder
from ssd_export.verify.spec import VerifySpec
from ssd_export.verify.verify import REPORT, add_report, verify

pytestmark = pytest.mark.slow

Exported = Callable[..., Path]
Rewriter = Callable[[Path], None]


def failed(report: dict[str, Any]) -> dict[str, Any]:
    """The rung that failed: the last that was run, all others passed."""
    *passed, last = report["rungs"]
    assert not report["ok"] and not last["ok"] and all(rung["ok"] for rung in passed)
    return last


# A right bundle


@pytest.mark.parametrize("policy, against", [("ssd-row", "checkpoint"), ("margin", "ort")])
def test_a_right_bundle_is_verified_up_to_the_image(
    exported: Exported, checkpoint: Path, policy: str, against: str
) -> None:
    path = exported(policy, 0.3 if policy == "margin" else 0.1)
    model = str(checkpoint) if against == "checkpoint" else None
    report = verify(VerifySpec(path, against, model=model))
    assert report["ok"], [rung["first_divergence"] for rung in report["rungs"]]
    rungs = {rung["name"]: rung["figures"] for rung in report["rungs"]}
    assert list(rungs) == [
        "contract",
        "compression",
        "ops",
        *["origin", "weights"] * (against == "checkpoint"),
        "layers",
        "logits",
        "tokens",
        "image",
        "operators",
    ]
    proof = rungs["compression"]
    assert proof["bytes_allocated"] == proof["bytes_promised"] < proof["bytes_full_cache"]
    assert proof["groups"]
    assert all(group["slots"] == group["promised"] for group in proof["groups"])
    assert min(rungs["logits"]["tokens_evicted_by_row"]) > 1000
    assert report["not_run"] == []
    bundle = add_report(path, report)
    assert (
        json.loads(bundle.file(REPORT).read_text())["bundle_hash"]
        == bundle.hash
        == open_bundle(path).hash
    )


def test_half_precision_has_its_own_tolerances(exported: Exported) -> None:
    report = verify(VerifySpec(exported("h2o", dtype="fp16"), "torch", "layers"))
    assert report["ok"] and report["tolerances"]["logits"] == 2e-2
    assert 1e-5 < report["rungs"][-1]["figures"]["greatest_error"] < 2e-2


# Planted faults


def test_heads_in_the_wrong_group_by_the_map(
    exported: Exported, manifest_rewriter: Rewriter
) -> None:
    path = exported()
    HeadMap.load(path / "head_map.json").swapped().save(path / "head_map.json")
    manifest_rewriter(path)
    rung = failed(verify(VerifySpec(path, "torch", "ops")))
    assert rung["name"] == "contract" and "head_map.json" in rung["first_divergence"]["what"]
    assert (rung["first_divergence"]["layer"], rung["first_divergence"]["group"]) == (0, 0)


def test_a_head_map_of_another_model(exported: Exported, manifest_rewriter: Rewriter) -> None:
    path = exported()
    replace(HeadMap.load(path / "head_map.json"), model_fingerprint="0" * 64).save(
        path / "head_map.json"
    )
    manifest_rewriter(path)
    assert (
        "another model"
        in failed(verify(VerifySpec(path, "torch", "ops")))["first_divergence"]["what"]
    )


def test_a_wrong_permutation_of_the_weights(
    exported: Exported, checkpoint: Path, change_config: Callable
) -> None:
    """The table names another head for a place than the exporter put there."""
    path = exported("h2o")  # one group: only the checkpoint can tell

    def swap(values: dict[str, Any]) -> None:
        order = values["policy"]["head_order"][1]
        order[0], order[1] = order[1], order[0]

    change_config(path, swap)
    rung = failed(verify(VerifySpec(path, "checkpoint", model=str(checkpoint))))
    assert rung["name"] == "weights" and rung["first_divergence"]["layer"] == 1
    assert "layers.1.qkv" in rung["first_divergence"]["what"]


def test_a_wrong_permutation_shows_in_the_layers_too(
    exported: Exported, checkpoint: Path, change_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssd_export.verify import verify as module
    from ssd_export.verify.checks import Rung

    path = exported("h2o")
    change_config(path, lambda values: values["policy"]["head_order"][1].reverse())
    monkeypatch.setattr(module, "check_weights", lambda *args: Rung("weights"))
    found = failed(verify(VerifySpec(path, "checkpoint", model=str(checkpoint))))
    assert found["name"] == "layers"
    assert (
        found["first_divergence"]["step"],
        found["first_divergence"]["layer"],
        found["first_divergence"]["what"],
    ) == (0, 1, "key")


@pytest.mark.parametrize(
    "tensor, layer",
    [("layers.0.qkv", 0), ("layers.1.down", 1), ("generation_head.vision_head", None)],
)
def test_one_flipped_weight(
    exported: Exported,
    checkpoint: Path,
    manifest_rewriter: Rewriter,
    tensor: str,
    layer: int | None,
) -> None:
    path = exported()
    place, shape = flip(path / "onnx" / "weights.safetensors", tensor)
    with pytest.raises(UserError, match="was changed"):
        verify(VerifySpec(path, "torch"))
    manifest_rewriter(path)
    rung = failed(verify(VerifySpec(path, "checkpoint", model=str(checkpoint))))
    found = rung["first_divergence"]
    assert rung["name"] == "weights" and found["layer"] == layer
    assert (
        f"1 of {np.prod(shape)} weights of {tensor} differ" in found["what"]
        and f"the first at {place}" in found["what"]
    )
    if tensor.endswith("qkv"):
        assert found["head"] is not None


def test_one_flipped_weight_shows_in_the_layers_too(
    exported: Exported,
    checkpoint: Path,
    manifest_rewriter: Rewriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ssd_export.verify import verify as module
    from ssd_export.verify.checks import Rung

    path = exported()
    flip(path / "onnx" / "weights.safetensors", "layers.1.qkv")
    manifest_rewriter(path)
    monkeypatch.setattr(module, "check_weights", lambda *args: Rung("weights"))
    rung = failed(verify(VerifySpec(path, "checkpoint", model=str(checkpoint))))
    assert rung["name"] in ("layers", "logits") and rung["first_divergence"]["layer"] == 1


def flip(path: Path, tensor: str) -> tuple[list[int], list[int]]:
    """Flips the sign of one weight in the middle of a tensor; its place and the tensor's shape."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    entry = json.loads(path.read_bytes()[8 : 8 + size])[tensor]
    with safe_open(path, framework="np") as file:
        values = file.get_tensor(tensor)
    index = int(np.abs(values[: values.shape[0] // 2]).argmax())
    data = bytearray(path.read_bytes())
    data[8 + size + entry["data_offsets"][0] + 4 * index + 3] ^= 0x80
    path.write_bytes(data)
    return [int(i) for i in np.unravel_index(index, values.shape)], entry["shape"]


def edited_groups(table: PolicyTable, edit: Callable[[HeadGroup], HeadGroup]) -> PolicyTable:
    return replace(
        table, layers=tuple(tuple(edit(group) for group in groups) for groups in table.layers)
    )


def export_with_other_graphs(
    checkpoint: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[HeadGroup], HeadGroup],
    policy: str,
) -> Path:
    """A bundle whose graphs were written for another rule than its table says."""
    write_graphs = exporter.write_graphs

    def faulty(folder: Path, config: Any, table: PolicyTable, *rest: Any) -> Any:
        return write_graphs(folder, config, edited_groups(table, edit), *rest)

    monkeypatch.setattr(exporter, "write_graphs", faulty)
    choice = PolicyChoice(str(checkpoint), policy, 0.1, lookahead=EACH_FOR_ITSELF)
    return export_bundle(choice.export_spec(out))


def guard_off_by_one(group: HeadGroup) -> HeadGroup:
    return (
        replace(group, rule=replace(group.rule, num_recent=group.rule.num_recent + 1))
        if group.rule.by_score
        else group
    )


def evict_off_by_one(group: HeadGroup) -> HeadGroup:
    return replace(group, evict_every=group.evict_every - 1) if group.evict_every > 1 else group


@pytest.mark.parametrize(
    "policy, edit, what",
    [
        ("h2o", guard_off_by_one, "attention function"),
        ("ssd-row", evict_off_by_one, "evict graph"),
    ],
)
def test_an_eviction_off_by_one_in_a_graph(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    edit: Callable,
    what: str,
) -> None:
    path = export_with_other_graphs(checkpoint, tmp_path / "b", monkeypatch, edit, policy)
    rung = failed(verify(VerifySpec(path, "torch")))
    found = rung["first_divergence"]
    assert (
        rung["name"] == "ops"
        and what in found["what"]
        and found["layer"] == 0
        and found["head"] is not None
    )


def test_an_eviction_one_step_late(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    eviction_steps = loop.eviction_steps
    monkeypatch.setattr(
        loop, "eviction_steps", lambda *args: {step + 1 for step in eviction_steps(*args)}
    )
    path = exported("linear")
    table = open_bundle(path).config.policy
    rung = failed(verify(VerifySpec(path, "torch", "logits")))
    found, group = rung["first_divergence"], table.layers[0][0]
    assert (
        rung["name"] == "logits"
        and "slot" in found["what"]
        and (found["layer"], found["group"]) == (0, 0)
    )
    assert found["step"] >= group.num_slots - table.prompt_slots + 1


def test_a_cache_that_is_not_compressed(exported: Exported, change_config: Callable) -> None:
    """Everything agrees with everything, only nothing is evicted."""
    path = exported("full", 1.0)
    change_config(path, lambda values: values["policy"].update(budget=0.2, name="h2o"))
    rung = failed(verify(VerifySpec(path, "torch")))
    assert (
        rung["name"] == "compression"
        and "not compressed: 576.0 image slots" in rung["first_divergence"]["what"]
    )


def test_a_table_that_promises_other_slots_than_the_graphs_have(
    exported: Exported, change_config: Callable, manifest_rewriter: Rewriter
) -> None:
    path, full = exported("h2o"), open_bundle(exported("full", 1.0)).config.graphs
    known = open_bundle(path).config.graphs
    change_config(
        path,
        lambda values: values.update(graphs={name: asdict(full[name]) for name in known}),
    )
    with pytest.raises(UserError, match=r"graphs\.prefill\.outputs\[\d+\]\.name is"):
        verify(VerifySpec(path, "torch"))
    path = exported("h2o")
    graph = ir.load(exported("full", 1.0) / "onnx" / "decode_step.onnx")
    ir.save(graph, path / "onnx" / "decode_step.onnx")
    manifest_rewriter(path)
    found = failed(verify(VerifySpec(path, "torch")))
    assert (
        found["name"] == "contract"
        and "past_key_values.0.0.key" in found["first_divergence"]["what"]
    )


def test_a_runner_that_allocates_more_than_promised(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_bytes = OrtRunner.cache_bytes
    monkeypatch.setattr(OrtRunner, "cache_bytes", lambda self: cache_bytes(self) + 4096)
    rung = failed(verify(VerifySpec(exported("h2o"), "torch", "ops")))
    assert (
        rung["name"] == "compression"
        and "cache bytes are allocated" in rung["first_divergence"]["what"]
    )


def test_a_sampler_that_draws_another_token(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = OrtRunner.tokens
    monkeypatch.setattr(OrtRunner, "tokens", lambda self: (tokens(self) + 1) % 1564)
    rung = failed(verify(VerifySpec(exported("h2o"), "torch")))
    assert (
        rung["name"] == "logits"
        and rung["first_divergence"]["what"] == "another token was drawn from equal logits"
    )


def test_an_image_that_is_too_dark(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd_export.verify.checks import Rung

    decode = OrtRunner.decode_image
    monkeypatch.setattr(OrtRunner, "decode_image", lambda self, tokens: decode(self, tokens) // 2)
    for name in ("logits", "tokens"):
        monkeypatch.setattr(ladder.Ladder, name, lambda self, name=name: Rung(name))
    assert failed(verify(VerifySpec(exported("h2o"), "torch")))["name"] == "image"


# Bad input


@pytest.mark.parametrize(
    "spec, fix",
    [
        (dict(against="numpy"), "choose one of ort, torch"),
        (dict(level="all"), "choose one of ops"),
        (dict(against="trt"), "--runner ort"),  # no GPU, or no engines: the trt runner's own words
        (dict(against="checkpoint"), "give --model"),
    ],
)
def test_bad_input(exported: Exported, spec: dict[str, str], fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        verify(VerifySpec(exported("h2o"), **spec))


def test_another_checkpoint(exported: Exported, checkpoint: Path, tmp_path: Path) -> None:
    from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint

    write_transformers_checkpoint(tmp_path, TinyJanus(seed=1))
    with pytest.raises(UserError, match="another checkpoint"):
        verify(VerifySpec(exported("h2o"), "checkpoint", model=str(tmp_path)))
