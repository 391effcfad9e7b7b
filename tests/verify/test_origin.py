"""What a bundle says of itself and both runners believe: verify notices where it is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.errors import UserError
from ssd_export.verify import generation
from ssd_export.verify.spec import VerifySpec
from ssd_export.verify.verify import verify

pytestmark = pytest.mark.slow

Exported = Callable[..., Path]
Change = Callable[[Path, Callable[[dict[str, Any]], Any]], None]
Rewriter = Callable[[Path], None]


def divergence(spec: VerifySpec, rung: str) -> str:
    """The fault that verify reports, at that rung."""
    last = verify(spec)["rungs"][-1]
    assert not last["ok"] and last["name"] == rung, last
    return str(last["first_divergence"]["what"])


def test_a_foreign_graph_with_top_k_that_no_image_runs(
    exported: Exported, manifest_rewriter: Rewriter
) -> None:
    """Of a policy with the same inputs and outputs: only what it computes differs."""
    path, other = exported("h2o", 0.3), exported("tova", 0.3)
    shutil.copyfile(other / "onnx/decode_step_top_k.onnx", path / "onnx/decode_step_top_k.onnx")
    manifest_rewriter(path)
    what = divergence(VerifySpec(path, "torch", "ops"), "contract")
    assert "decode_step_top_k.onnx" in what


@pytest.mark.parametrize("name", ["prefill", "decode_step"])
def test_one_constant_of_a_graph_with_top_k(
    exported: Exported, manifest_rewriter: Rewriter, name: str
) -> None:
    path = exported("h2o", 0.3)
    file = path / f"onnx/{name}_top_k.onnx"
    model = ir.load(file)
    constant = next(
        attribute
        for node in model.graph
        for attribute in node.attributes.values()
        if attribute.name == "value" and attribute.as_tensor().dtype == ir.DataType.FLOAT
    )
    value = constant.as_tensor().numpy() * 1.5
    node = next(n for n in model.graph if constant in n.attributes.values())
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.astype("float32")))
    ir.save(model, file)
    manifest_rewriter(path)
    what = divergence(VerifySpec(path, "torch", "ops"), "contract")
    assert f"{name}_top_k.onnx computes something else than {name}" in what


def test_a_sampler_that_ignores_top_k(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws with top-k are compared although the usual generation has none."""
    from ssd_export.runtime.ort_runner import OrtRunner

    plain = OrtRunner.prefill

    def without_top_k(self: OrtRunner, batch: Any) -> None:
        from dataclasses import replace

        sampling = tuple(replace(one, top_k=0) for one in batch.sampling)
        plain(self, replace(batch, sampling=sampling))

    monkeypatch.setattr(OrtRunner, "prefill", without_top_k)
    monkeypatch.setattr(generation, "TOP_K", 1)
    what = divergence(VerifySpec(exported("h2o", 0.3), "torch", "tokens"), "tokens")
    assert what == "another token was drawn with top-k 1"


def test_a_swapped_tokenizer(
    exported: Exported, checkpoint: Path, manifest_rewriter: Rewriter
) -> None:
    path = exported("h2o")
    spec = json.loads((path / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    (path / "tokenizer.json").write_text(json.dumps(spec))
    manifest_rewriter(path)
    what = divergence(VerifySpec(path, model=str(checkpoint), level="layers"), "origin")
    assert what == "tokenizer.json is not the checkpoint's"


@pytest.mark.parametrize("name, value", [("temperature", 0.4), ("cfg_scale", 7.0)])
def test_another_default(
    exported: Exported, checkpoint: Path, change_config: Change, name: str, value: float
) -> None:
    path = exported("h2o")
    change_config(path, lambda values: values["generation"].update({name: value}))
    what = divergence(VerifySpec(path, model=str(checkpoint), level="layers"), "origin")
    assert f"{name}={value}" in what and "the checkpoint's is" in what


@pytest.mark.parametrize(
    "policy, name", [("h2o", "tova"), ("tova", "h2o"), ("h2o", "streaming-llm"), ("h2o", "full")]
)
def test_another_policys_name(
    exported: Exported, change_config: Change, policy: str, name: str
) -> None:
    path = exported(policy, 0.3)
    change_config(path, lambda values: values["policy"].update(name=name))
    assert f"{name}" in divergence(VerifySpec(path, "torch", "ops"), "contract")


@pytest.mark.parametrize("policy", ["h2o", "tova", "linear", "streaming-llm", "ssd-row", "margin"])
def test_every_policy_goes_by_its_own_name(exported: Exported, policy: str) -> None:
    report = verify(VerifySpec(exported(policy, 0.3), "torch", "ops"))
    assert report["ok"], report["rungs"][-1]


def test_a_wrong_fingerprint(exported: Exported, checkpoint: Path, change_config: Change) -> None:
    path = exported("h2o")
    change_config(path, lambda values: values.update(model_fingerprint="0" * 64))
    with pytest.raises(UserError, match="made from another checkpoint .fingerprint 000000000000"):
        verify(VerifySpec(path, model=str(checkpoint), level="ops"))
    assert open_bundle(path).config.model_fingerprint == "0" * 64


def test_a_wrong_fingerprint_of_the_demo(tmp_path: Path, change_config: Change) -> None:
    """Without --model the demo's own weights tell."""
    from ssd_export.export.exporter import export_bundle
    from ssd_export.model.find import DEMO_CHECKPOINT
    from tests.runtime.checkpoints import export_spec

    if not DEMO_CHECKPOINT.is_dir():
        pytest.skip("needs the demo checkpoint")
    spec = export_spec(Path("demo"), "streaming-llm", 0.3, out=tmp_path / "b", prompt_slots=64)
    path = export_bundle(spec)
    change_config(path, lambda values: values.update(model_fingerprint="0" * 64))
    with pytest.raises(UserError, match="whose fingerprint is .* and says 000000000000"):
        verify(VerifySpec(path, level="ops"))
