"""An adapter that is merged on the way gives what merging first gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssd_export.errors import UserError
from ssd_export.export.exporter import ExportSpec, export_bundle
from ssd_export.model.checkpoint import open_checkpoint
from ssd_export.verify.spec import VerifySpec
from ssd_export.verify.verify import verify
from tests.janus_checkpoints import (
    TinyJanus,
    write_original_checkpoint,
    write_transformers_checkpoint,
)
from tests.llamagen_checkpoints import TinyLlamaGen, gpt_weights, write_llamagen_checkpoint

RANK, ALPHA = 4, 6.0
QUERY = "model.language_model.layers.0.self_attn.q_proj"
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    **said: object,
) -> Path:
    """Random factors for modules of these shapes, as PEFT saves them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            values = torch.randn(shape, generator=generator) / 4
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_first(
    weights: dict[str, Tensor], folder: Path, scaling: float = ALPHA / RANK
) -> dict[str, Tensor]:
    """As peft's merge_and_unload() adds the factors, by stored name."""
    factors = load_file(folder / "adapter_model.safetensors")
    merged = dict(weights)
    for name, up in factors.items():
        if name.endswith("lora_B.weight"):
            down = factors[name.replace("lora_B", "lora_A")]
            stored = name.removeprefix("base_model.model.").replace("lora_B.", "")
            delta = ((up.float() @ down.float()) * scaling).to(up.dtype)
            merged[stored] = weights[stored].clone().add_(delta)
    return merged


def stored_shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the modules that are adapted."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in weights.items()
        if "language_model" in name and name.removesuffix(".weight").endswith(TARGETS)
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_on_the_way_is_merging_first(
    tmp_path: Path, dtype: torch.dtype, use_rslora: bool
) -> None:
    base = write_transformers_checkpoint(tmp_path / "base", TinyJanus(num_kv_heads=2))
    weights = load_file(base / "model.safetensors")
    if dtype != torch.float32:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        save_file(weights, base / "model.safetensors")
    shapes = stored_shapes(weights)
    lora = adapter(tmp_path / "lora", shapes, dtype, use_rslora=use_rslora)
    scaling = ALPHA / RANK**0.5 if use_rslora else ALPHA / RANK
    first = write_transformers_checkpoint(tmp_path / "first", TinyJanus(num_kv_heads=2))
    save_file(merge_first(weights, lora, scaling), first / "model.safetensors")
    ours, theirs = open_checkpoint(base, lora), open_checkpoint(first)
    for name in theirs.names():
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name
    assert ours.fingerprint() == theirs.fingerprint() != open_checkpoint(base).fingerprint()


def test_bundles_of_both_ways_are_the_same(tmp_path: Path) -> None:
    base = write_original_checkpoint(tmp_path / "base", TinyJanus())
    weights = torch.load(base / "pytorch_model.bin")
    lora = adapter(tmp_path / "lora", stored_shapes(weights))
    first = write_original_checkpoint(tmp_path / "first", TinyJanus())
    torch.save(merge_first(weights, lora), first / "pytorch_model.bin")
    ours = export_bundle(ExportSpec(str(base), policy="h2o", out=tmp_path / "a", lora=lora))
    theirs = export_bundle(ExportSpec(str(first), policy="h2o", out=tmp_path / "b"))
    one, other = ((folder / "onnx/weights.safetensors").read_bytes() for folder in (ours, theirs))
    assert one == other


def test_a_fused_matrix_is_adapted_before_it_is_divided(tmp_path: Path) -> None:
    tiny = TinyLlamaGen(num_kv_heads=2)
    base = write_llamagen_checkpoint(tmp_path / "base", tiny)
    weights = gpt_weights(tiny)
    shape = tuple(weights["layers.0.attention.wqkv.weight"].shape)
    shapes = {f"layers.{layer}.attention.wqkv": shape for layer in range(2)}
    lora = adapter(tmp_path / "lora", shapes)
    first = write_llamagen_checkpoint(tmp_path / "first", tiny)
    torch.save({"model": merge_first(weights, lora)}, first / "c2i_B_tiny.pt")
    ours, theirs = open_checkpoint(base, lora), open_checkpoint(first)
    for name in theirs.names():
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name


def test_a_language_model_adapted_by_itself_is_found(tmp_path: Path) -> None:
    base = write_original_checkpoint(tmp_path / "base", TinyJanus())
    lora = adapter(tmp_path / "lora", {"model.layers.1.self_attn.q_proj": (64, 64)})
    changed, plain = open_checkpoint(base, lora), open_checkpoint(base)
    name = "language_model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(changed.tensor(name), plain.tensor(name))


@pytest.mark.parametrize(
    ("shapes", "said", "message"),
    [
        ({QUERY: (64, 32)}, {}, r"adds \[64, 4\] x \[4, 32\] to a matrix"),
        ({QUERY.replace("0", "9"): (64, 64)}, {}, "no module of this model"),
        ({"encoder.layers.0.query": (64, 64)}, {}, "this model: give the adapter of this"),
        ({QUERY: (64, 64)}, {"use_dora": True}, "use_dora is 'True', .* merge it with peft"),
        ({QUERY: (64, 64)}, {"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({QUERY: (64, 64)}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({QUERY: (64, 64)}, {"lora_alpha": "x"}, "lora_alpha is 'x', expected a"),
    ],
)  # fmt: skip
def test_an_adapter_of_something_else_is_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], said: dict[str, object], message: str
) -> None:
    base = write_transformers_checkpoint(tmp_path / "base", TinyJanus(num_layers=1))
    lora = adapter(tmp_path / "lora", shapes, **said)
    with pytest.raises(UserError, match=message):
        open_checkpoint(base, lora)


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    base = write_transformers_checkpoint(tmp_path / "base", TinyJanus(num_layers=1))
    lora = adapter(tmp_path / "lora", {QUERY: (64, 64)})
    weights = load_file(lora / "adapter_model.safetensors")
    up = f"base_model.model.{QUERY}.lora_B.weight"
    save_file({**weights, up: weights[up] * torch.nan}, lora / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lora_B.weight holds NaN"):
        open_checkpoint(base, lora)
    save_file({up: weights[up]}, lora / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has one factor of two"):
        open_checkpoint(base, lora)
    save_file({f"base_model.model.{QUERY}.bias": weights[up]}, lora / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no factor of a LoRA"):
        open_checkpoint(base, lora)
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        open_checkpoint(base, lora)
    with pytest.raises(UserError, match="no adapter at"):
        open_checkpoint(base, tmp_path / "nothing")


@pytest.mark.slow
def test_a_bundle_with_an_adapter_is_verified_against_both(tmp_path: Path) -> None:
    base = write_transformers_checkpoint(tmp_path / "base", TinyJanus(num_layers=1))
    folder = adapter(tmp_path / "adapter", stored_shapes(load_file(base / "model.safetensors")))
    spec = ExportSpec(str(base), "h2o", 0.1, lora=folder, out=tmp_path / "bundle")
    bundle = export_bundle(spec)
    report = verify(VerifySpec(bundle, "checkpoint", "layers", str(base), lora=folder))
    assert report["ok"] and report["against"] == "checkpoint"
    assert {"weights", "layers"} <= {rung["name"] for rung in report["rungs"]}
    with pytest.raises(UserError, match="made from another checkpoint .* with --lora"):
        verify(VerifySpec(bundle, "checkpoint", "layers", str(base)))
    for wrong, complaint in (
        (VerifySpec(bundle, lora=folder), "give that, too, with --model"),
        (VerifySpec(bundle, "torch", model=str(base), lora=folder), "leave it out"),
    ):
        with pytest.raises(UserError, match=complaint):
            verify(wrong)
