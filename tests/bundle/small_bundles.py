"""Bundles of a few kilobytes: a whole ssd_config.json, and files of any content where graphs and
weights would be.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ssd_export.bundle import (
    BundleConfig,
    GenerationDefaults,
    Precision,
    TextEmbeddingTable,
    write_bundle,
    write_config,
)
from ssd_export.bundle.graphs import promised_graphs
from ssd_export.config import ModelConfig, VQConfig
from ssd_export.errors import UserError
from ssd_export.model.families import janus
from ssd_export.policy.make import make_policy
from ssd_export.policy.table import PolicyTable

MODEL = ModelConfig(
    vocab_size=100,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_positions=1024,
    codebook_size=64,
    codebook_dim=8,
    vq=VQConfig(32, 32, (1, 1), 1),
    family=janus.NAME,
    grid=janus.GRID,
    rows_per_image=janus.ROWS_PER_IMAGE,
)
WEIGHTS_FILE = "onnx/weights.safetensors"
WEIGHTS = bytes(index % 251 for index in range(MODEL.vocab_size * MODEL.hidden_size * 2))


def small_config(
    model: ModelConfig = MODEL, policy: PolicyTable | None = None, **changes: object
) -> BundleConfig:
    """What an export of the model would say; changes: other fields."""
    table = policy or make_policy("h2o", model, budget=0.2)
    specs = promised_graphs(model, table, "float16")
    config = BundleConfig(
        model_name="small",
        model_revision=None,
        model_fingerprint="f" * 64,
        layers_of_the_model=model.num_layers,
        model=model,
        dtype="float16",
        precision=Precision(),
        target=None,
        policy=table,
        generation=GenerationDefaults(),
        text_embeddings=TextEmbeddingTable(
            "onnx/weights.safetensors", 0, "float16", (model.vocab_size, model.hidden_size)
        ),
        graphs={spec.name: spec for spec in specs},
    )
    return replace(config, **changes)


def write_small_bundle(target: Path, config: BundleConfig, force: bool = False) -> Path:
    """A bundle of this config; its graphs and weights cannot be run."""
    with write_bundle(target, force) as folder:
        fill(folder, config)
    return target


def fill(folder: Path, config: BundleConfig) -> None:
    """Writes the files of a bundle but for its manifest."""
    write_config(folder, config)
    (folder / "onnx").mkdir()
    for name in config.graphs:
        (folder / "onnx" / f"{name}.onnx").write_text(name)
    (folder / "onnx" / "weights.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer.json").write_text("{}")


def write(target: Path, force: bool = False, text: str = "graph") -> Path:
    """A bundle whose decode step is this text."""
    with write_bundle(target, force) as folder:
        fill(folder, small_config())
        (folder / "onnx" / "decode_step.onnx").write_text(text)
    return target


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)
